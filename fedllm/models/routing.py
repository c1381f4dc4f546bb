"""Which sites a query goes to: their values by samples (ReDDE), centroids, descriptions, or a learned map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

DEPTH = 10
"""ReDDE: so many of all sites' samples are looked at, the nearest first."""
RIDGE = 1.0
"""Learned: the weight of the squared norm."""


def redde(query: Tensor, samples: Mapping[str, Tensor], sizes: Mapping[str, float], depth: int = DEPTH
          ) -> dict[str, float]:
    """Each of the `depth` samples that are nearest to the query [d] stands for size / sample documents of its site.

    Values are shares that add up to 1; sites of which no sample is among them follow by their nearest one, below.
    `samples` are vectors of length 1, [s, d] a site. Si and Callan, SIGIR 2003.
    """
    near = {site: (x @ query.to(x.dtype)).double() for site, x in samples.items() if len(x)}
    every = sorted(((float(c), site) for site, cs in near.items() for c in cs), key=lambda e: (-e[0], e[1]))
    value = dict.fromkeys(samples, 0.0)
    for _, site in every[:depth]:
        value[site] += sizes[site] / len(near[site])
    whole = sum(value.values()) or 1.0
    return {site: v / whole + 1e-6 * (1 + float(near[site].max()) if site in near else 0) for site, v in value.items()}


def centroids(query: Tensor, centers: Mapping[str, Tensor]) -> dict[str, float]:
    """The cosine of the query to the nearest of a site's centers [c, d]."""
    return {site: float((x @ query.to(x.dtype)).max()) if len(x) else -1.0 for site, x in centers.items()}


def learned(query: Tensor, weights: Tensor, sites: Sequence[str]) -> dict[str, float]:
    """The value of each site by a linear map [d + 1, sites] of the query."""
    x = torch.cat([query.double(), torch.ones(1, dtype=torch.float64)])
    return dict(zip(sites, (x @ weights).tolist(), strict=True))


def fit(x: Tensor, y: Tensor, ridge: float = RIDGE) -> Tensor:
    """The linear map of x [n, d] (and a constant) to y [n, sites] by ridge regression, fp64 [d + 1, sites]."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weigh = ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weigh[-1, -1] = 1e-9  # the constant is free
    return torch.linalg.solve(x.T @ x + weigh, x.T @ y.double())


def of_samples(samples: Mapping[str, Tensor]) -> Tensor:
    """The map that says of a vector whose sample it is; sites weigh alike, whatever their sample's size."""
    sites = [s for s, x in samples.items() if len(x)]
    x = torch.cat([samples[s].double() for s in sites])
    y = torch.cat([torch.eye(len(samples), dtype=torch.float64)[list(samples).index(s)].repeat(len(samples[s]), 1)
                   for s in sites])
    weight = torch.cat([torch.full((len(samples[s]), 1), len(samples[s]) ** -0.5, dtype=torch.float64) for s in sites])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) * weight
    weigh = RIDGE / max(1, len(sites)) * torch.eye(x.shape[1], dtype=torch.float64)
    weigh[-1, -1] = 1e-9
    return torch.linalg.solve(x.T @ x + weigh, x.T @ (y * weight))


def centers_of(x: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """At most so many centers [c, d] of vectors [n, d], of length 1: their mean, or the means of k-means' groups."""
    if count == 1 or len(x) <= count:
        means = x.mean(0, keepdim=True) if count == 1 else x
    else:
        from fedllm.data.cluster import clusters

        group = torch.from_numpy(clusters([""] * len(x), count, rng, x.double().numpy()))
        means = torch.stack([x[group == g].mean(0) for g in sorted(set(group.tolist()))])
    return torch.nn.functional.normalize(means, dim=-1)


def best(values: Mapping[str, float], count: int) -> list[str]:
    """So many sites, those of the largest value first; of equals the one first by name."""
    return sorted(values, key=lambda s: (-values[s], s))[:count]

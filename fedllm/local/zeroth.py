"""Descent by losses alone: two forwards a step, along a random direction that both sides know by its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.local.perturb import Directions, Law, flat, unflat


@dataclass
class Walk:
    """A client's steps: where they led, and the scalars along the way (0 where a step was left out)."""

    w: Tensor
    g: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean of the losses met."""
        return float(np.mean(self.losses)) if self.losses else 0.0


def walk(client: Any, start: Tree, law: Law, seed: int, numbers: Sequence[int], eps: float, lr: float,
         decay: float = 0.0, clip: float | None = None) -> Walk:
    """w <- w - lr (g z_j + decay w) for each j of `numbers`, each on the client's next batch; matrices alone decay.

    g = (L(w + eps z_j) - L(w - eps z_j)) / 2 eps, rounded to fp32, as it will travel. A step whose losses are not
    finite, or further apart than `clip`, is left out.
    """
    went = Walk(flat(start).clone())
    z, decays = Directions(seed, len(went.w), law), decay * flat({n: torch.full_like(t, float(t.dim() > 1))
                                                                  for n, t in start.items()})
    for rows, j in zip(client.batches(len(numbers)), numbers, strict=True):
        along = z.direction(int(j)).to(went.w.dtype)
        up, low = slope(client, went.w, along, eps, start, rows)
        g = float(np.float32((up - low) / (2 * eps)))
        if not math.isfinite(g) or (clip is not None and abs(up - low) > clip):
            went.g.append(0.0)
            continue
        if decay:
            went.w -= lr * decays * went.w
        went.w.sub_(along, alpha=lr * g)
        went.g.append(g)
        went.losses.append((up + low) / 2)
    return went


def slope(client: Any, w: Tensor, along: Tensor, eps: float, like: Tree, rows: Sequence[int]) -> tuple[float, float]:
    """L(w + eps z) and L(w - eps z) on these rows: two lanes of one forward."""
    up, low = client.probe([unflat(torch.add(w, along, alpha=sign * eps), like) for sign in (1, -1)], rows)
    return up.mean, low.mean


def replay(w0: Tree, weights: Tensor, seed: int, lr: float, law: Law) -> Tree:
    """w_0 - lr sum_j A_j z_j, always added in the order of j: equal bits on every side."""
    w = flat(w0).clone()
    Directions(seed, len(w), law).add(w, {j: -lr * float(weights[j]) for j in weights.nonzero()[:, 0].tolist()})
    return unflat(w, w0)


def rebuild(model: Any, weights: Tensor, seed: int, lr: float, law: Law) -> Tree:
    """The model of these weights, from the base that everybody has."""
    return replay(model.initial(), weights, seed, lr, law)

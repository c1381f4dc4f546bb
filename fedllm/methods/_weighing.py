"""Agents that weigh clients: what the server sees of each client's step, weights by levels, what weights are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.method import knob
from fedllm.core.payload import Tree, add
from fedllm.local.objective import Objective
from fedllm.local.objectives.distill import Distill
from fedllm.methods._qmix import Step, values

FEATURES = 6
"""Numbers of a client's state: what its step alone is worth on the probe, its loss, its share of the rows, the size of
its step, how far it goes the mean way, and how long it was away."""


@dataclass(frozen=True)
class Near(Objective):
    """The task's own loss + weight T^2 KL(softmax(z_global / T) || softmax(z_local / T)), row by row."""

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    weight: float = knob(0.5, "lambda", gt=0)
    temperature: float = knob(2.0, "T", gt=0)

    def losses(self, model: Any, batch: Any, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        total, count = Distill(self.temperature, ce=1 / (1 + self.weight)).losses(model, batch, side)
        return (1 + self.weight) * total, count


def probed(client: Any, thetas: Sequence[Tree]) -> list[float]:
    """How sure each of these models is of the public rows' labels."""
    return [sure(got) for got in client.probe(thetas, on=client.public)]


def features(worth: Sequence[float], losses: Sequence[float], share: np.ndarray, deltas: Sequence[Tree],
             away: Sequence[int]) -> Tensor:
    """Each client's state [K, 6], fp64, within 5 of 0: all but shares and rounds are told against the round's mean."""
    flat = torch.stack([torch.cat([t.double().flatten() for t in d.values()]) for d in deltas])  # [K, size]
    size = flat.norm(dim=1)
    way = (torch.from_numpy(share)[:, None] * flat / size.clamp(min=1e-12)[:, None]).sum(0)
    cos = flat @ way / (size * way.norm()).clamp(min=1e-12)
    told = [_standard(torch.tensor(worth, dtype=torch.float64)), _standard(torch.tensor(losses, dtype=torch.float64)),
            torch.from_numpy(share) * len(share) - 1, _standard(size.clamp(min=1e-12).log()), cos,
            torch.tensor(away, dtype=torch.float64) / 10]
    return torch.nan_to_num(torch.stack(told, 1), posinf=5.0, neginf=-5.0).clamp(-5, 5)


def _standard(x: Tensor) -> Tensor:
    x = torch.nan_to_num(x, nan=0.0, posinf=1e6, neginf=-1e6)
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-9)


def scores(levels: Tensor, count: int, spread: float) -> Tensor:
    """From -spread to spread, by level."""
    return spread * (2 * levels.double() / (count - 1) - 1)


def weights(share: np.ndarray, levels: Sequence[int] | Tensor, count: int, spread: float, subset: bool) -> np.ndarray:
    """p_k ~ n_k exp(score_k), or of a subset p_k ~ n_k for those on the upper level; of all alike it is FedAvg's."""
    level = torch.as_tensor(levels)
    by = level.numpy().astype(float) if subset else scores(level, count, spread).exp().numpy()
    p = share * by
    return p / p.sum() if p.sum() > 0 else share


def chosen(net: Tree, s: Tensor, explore: float, count: int, rng: np.random.Generator) -> Tensor:
    """Each client's level: the best by its Q, or one at random."""
    best, tried = values(net, s).argmax(1).numpy(), rng.integers(count, size=len(s))
    return torch.from_numpy(np.where(rng.random(len(s)) < explore, tried, best))


def tried(levels: Tensor, count: int, tries: int, rng: np.random.Generator) -> list[Tensor]:
    """Other levels to be told apart from these: each client's drawn anew with one half."""
    n = len(levels)
    return [torch.from_numpy(np.where(rng.random(n) < 0.5, rng.integers(count, size=n), levels.numpy()))
            for _ in range(tries)]


def by_bandit(past: Sequence[float], worth: Sequence[float], rate: float = 0.3) -> list[float]:
    """Each client's value: a running mean of what its steps alone were worth."""
    return [v + rate * (float(np.nan_to_num(w, posinf=0, neginf=0)) - v) for v, w in zip(past, worth, strict=True)]


def bandit_weights(share: np.ndarray, value: Sequence[float], spread: float) -> np.ndarray:
    """p_k ~ n_k exp(spread * standardized value), held within the spread."""
    p = share * np.exp(spread * _standard(torch.tensor(value, dtype=torch.float64)).clamp(-1, 1).numpy())
    return p / p.sum()


def moved(theta: Tree, deltas: Sequence[Tree], p: Sequence[float]) -> Tree:
    """theta + sum_k p_k delta_k"""
    for w, d in zip(p, deltas, strict=True):
        theta = add(theta, d, float(w))
    return theta


def sure(losses: Any) -> float:
    """The mean probability of what is right, from row losses; what is no number counts as none."""
    p = np.exp(-np.maximum(0.0, np.nan_to_num(losses.total / np.maximum(1.0, losses.count), nan=1e9, posinf=1e9)))
    return float(p.mean())


def remembered(past: Mapping[str, Any]) -> list[Step]:
    """What was tried in past rounds, as steps to learn from."""
    return [Step(one["s"], a, float(r), one["after"]) for one in past.values() if "after" in one
            for a, r in zip(one["a"], one["r"], strict=True)]

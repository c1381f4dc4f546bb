"""Numbers as a few levels, each told by randomized response: unbiased, and epsilon-LDP for a single number."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def coded(x: Tensor, bound: float, bits: int, epsilon: float | None, rng: np.random.Generator) -> Tensor:
    """Levels 0 ... 2^bits - 1 of x clipped to [-bound, bound], uint8: rounded up or down by a coin that makes the mean
    right; with `epsilon` the level is kept with e^eps / (e^eps + k - 1), and else is any of the k - 1 others."""
    k = 1 << bits
    at = (x.detach().double().clamp(-bound, bound).numpy() + bound) / (2 * bound) * (k - 1)
    low = np.floor(at)
    level = np.minimum(low + (rng.random(at.shape) < at - low), k - 1).astype(np.int64)
    if epsilon is not None:
        other = (level + rng.integers(1, k, at.shape)) % k
        level = np.where(rng.random(at.shape) < _kept(k, epsilon), level, other)
    return torch.from_numpy(level.astype(np.uint8))


def decoded(level: Tensor, bound: float, bits: int, epsilon: float | None) -> Tensor:
    """What the levels stand for, fp64, so that its mean is the number that was coded.

    The levels' values sum to 0, so E[told] = v (p - (1 - p) / (k - 1)).
    """
    k = 1 << bits
    v = level.double() / (k - 1) * 2 * bound - bound
    if epsilon is None:
        return v
    p = _kept(k, epsilon)
    return v / (p - (1 - p) / (k - 1))


def _kept(k: int, epsilon: float) -> float:
    """e^eps / (e^eps + k - 1), also where e^eps is too large to be written."""
    return 1 / (1 + (k - 1) * math.exp(-epsilon))

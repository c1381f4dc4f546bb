"""Random directions by number: entry i of direction j follows from (seed, j, i), whoever draws it and in what parts.

One stream of 16-bit numbers with random access (PCG64-DXSM, jumped ahead) lies under all of them, always on the CPU, so
that no device, no order and no partition changes a value. One number is two Gaussian entries: one of 65,536 points in
the plane that stand for N(0, I_2) (no entry is above 4.8). Or it is one Rademacher entry, a bit, of each of 16
directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.payload import Tree

Law = Literal["gaussian", "rademacher"]
LAWS = ("gaussian", "rademacher")
LEVELS = 1 << 16
BITS = 16  # directions that share a number under "rademacher"
PERIOD = 1 << 128
STRIDE = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""Words from one direction's stream to the next: the golden ratio of the period, so no common bits."""
CHUNK = 1 << 18  # entries at a time, so that what is drawn stays in the cache
Drawn = Callable[[int, int], np.ndarray]
"""(start, count) -> these entries of a weighted sum of directions that share numbers."""


@dataclass(frozen=True)
class Directions:
    """z_0, z_1, ... in R^size, of independent entries with mean 0 and variance 1."""

    seed: int
    size: int
    law: Law = "gaussian"

    def __post_init__(self) -> None:
        if self.seed < 0 or self.size < 0 or self.law not in LAWS:
            raise RecipeError(f"Directions(seed={self.seed}, size={self.size}, law={self.law!r}): allowed are a seed "
                              f"and a size from 0 up and a law of {list(LAWS)}")

    def direction(self, j: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries [start, stop) of z_j, fp32."""
        out = torch.zeros((self.size if stop is None else stop) - start)
        self.add(out, {j: 1.0}, start)
        return out

    def add(self, w: Tensor, weights: Mapping[int, float], start: int = 0) -> Tensor:
        """w += sum_j a_j z_j in place, in the order of j; `w` are entries from `start` on of a vector on the CPU.

        Each entry is computed by itself, so that parts of a vector get the very bits that the whole one gets.
        """
        if min(weights, default=0) < 0 or start < 0 or start + len(w) > self.size:
            raise RecipeError(f"directions {sorted(weights)[:3]}, entries {start} to {start + len(w)}: allowed are "
                              f"numbers from 0 up and entries up to {self.size}")
        into = w.numpy()
        each = self._gaussian if self.law == "gaussian" else self._rademacher
        for drawn in each(weights, into.dtype):
            for at in range(0, len(into), CHUNK):
                part = into[at : at + CHUNK]
                part += drawn(start + at, len(part))
        return w

    def _gaussian(self, weights: Mapping[int, float], dtype: np.dtype) -> Iterator[Drawn]:
        """One number, two neighboring entries."""
        pair = np.dtype(f"c{2 * dtype.itemsize}")
        for j in sorted(weights):
            table = (spiral() * weights[j]).astype(pair) if self._long else spiral()

            def drawn(start: int, count: int, j: int = j, table: np.ndarray = table) -> np.ndarray:
                first, last = start // 2, (start + count + 1) // 2
                both = table.take(self._numbers(j, first, last - first), mode="wrap")
                both = both if self._long else (both * weights[j]).astype(pair)
                return both.view(dtype)[start - 2 * first :][:count]

            yield drawn

    def _rademacher(self, weights: Mapping[int, float], dtype: np.dtype) -> Iterator[Drawn]:
        """Per 16 directions a table of all 65,536 sums of +-a_j, or two of 256 where the vector is short."""
        for group in sorted({j // BITS for j in weights}):
            a = np.array([weights.get(group * BITS + b, 0.0) for b in range(BITS)])
            tables = [signed_sums(part).astype(dtype) for part in ([a] if self._long else [a[:8], a[8:]])]

            def drawn(start: int, count: int, group: int = group, tables: list = tables) -> np.ndarray:
                numbers = self._numbers(group, start, count)
                if self._long:
                    return tables[0].take(numbers, mode="wrap")
                low, high = numbers.view(np.uint8).reshape(-1, 2).T
                return tables[0].take(low) + tables[1].take(high)

            yield drawn

    @property
    def _long(self) -> bool:
        """Whether a table of all numbers pays; a matter of the whole vector, so that its parts get the same bits."""
        return self.size >= LEVELS

    def _numbers(self, stream: int, start: int, count: int) -> np.ndarray:
        """Numbers [start, start + count) of a stream, uint16."""
        first, last = start // 4, -(-(start + count) // 4)  # four numbers a word
        bits, here = self._source
        target = (stream * STRIDE + first) % PERIOD
        bits.advance((target - here[0]) % PERIOD)
        words = bits.random_raw(last - first).astype("<u8", copy=False)
        here[0] = (target + last - first) % PERIOD
        return words.view("<u2")[start - 4 * first :][:count]

    @functools.cached_property
    def _source(self) -> tuple[np.random.PCG64DXSM, list[int]]:
        """The generator, and the word at which it stands."""
        return np.random.PCG64DXSM(self.seed), [0]


@functools.cache
def spiral() -> np.ndarray:
    """65,536 points that stand for N(0, I_2), complex [65536]: mean 0, covariance 1, radii at Rayleigh's mid-quantiles.

    Half of them lie on a golden spiral, each at the angle that is farthest from those before it; the others opposite.
    """
    k = np.arange(LEVELS // 2)
    radius, angle = np.sqrt(-2 * np.log((k + 0.5) / len(k))), k * np.pi * (3 - 5**0.5)
    half = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    both = np.concatenate([half, -half])
    both = both @ np.linalg.inv(np.linalg.cholesky(both.T @ both / LEVELS)).T
    both = both.astype(np.float32).astype(np.float64)  # whatever the last bits of sin and log are elsewhere
    return both.view(np.complex128)[:, 0]


def signed_sums(a: np.ndarray) -> np.ndarray:
    """Entry b is sum_t (+a_t where bit t of b is set, else -a_t), fp64 [2^len(a)]."""
    out = np.zeros(1)
    for x in a:
        out = np.concatenate([out - x, out + x])
    return out


def flat(tree: Tree) -> Tensor:
    """All trainables as one vector [P], in name order."""
    return torch.cat([tree[n].flatten() for n in sorted(tree)])


def unflat(w: Tensor, like: Tree) -> Tree:
    """The vector [P] as a tree again; the leaves are views."""
    parts = dict(zip(sorted(like), w.split([like[n].numel() for n in sorted(like)]), strict=True))
    return {n: parts[n].view_as(x) for n, x in like.items()}


class Halves:
    """Weighted gradients [P] in two halves: every client is in both, so that they differ by the directions alone."""

    def __init__(self, size: int) -> None:
        self.sums, self.weights, self.count = torch.zeros(2, size), [0.0, 0.0], 0

    def add(self, g: Tensor, weight: float, turn: int) -> None:
        """Puts one into the half whose turn it is."""
        self.sums[turn % 2] += weight * g
        self.weights[turn % 2] += weight
        self.count += 1

    def mean(self) -> Tensor:
        """Of all."""
        return self.sums.sum(0) / sum(self.weights)

    def disagreement(self, kind: str) -> float:
        """Mean over entries of (a - b)^2 / 2, with a and b the halves' means; infinite while one is empty."""
        if not all(self.weights):
            return float("inf")
        a, b = (s / w for s, w in zip(self.sums, self.weights, strict=True))
        apart = float((a - b).pow(2).mean()) / 2
        return apart if kind == "absolute" else apart / max(1e-30, float(self.mean().pow(2).mean()))

"""CMA-ES (Hansen, arXiv 1604.00772): a normal distribution that moves to where the better samples lie.

Positive weights only. State is a frozen value of plain fp64 arrays, so that it can be sent, kept and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedllm.core.errors import RecipeError


def rank_weights(samples: int, parents: int) -> np.ndarray:
    """w_i ~ log(mu + 1/2) - log(i) for the best `parents` of so many samples, 0 for the others; they add up to 1."""
    if not 1 <= parents <= samples:
        raise RecipeError(f"CMA-ES: {parents} parents of {samples} samples are not allowed; it must be 1 to {samples}")
    w = np.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
    return np.concatenate([w / w.sum(), np.zeros(samples - parents)])


@dataclass(frozen=True, eq=False)
class Search:
    """N(mean, sigma^2 C) in R^q with its evolution paths after `told` generations."""

    mean: np.ndarray
    sigma: float
    C: np.ndarray
    pc: np.ndarray
    ps: np.ndarray
    told: int = 0

    @classmethod
    def start(cls, mean: np.ndarray, sigma: float, C: np.ndarray | None = None) -> Search:
        """A search with fresh paths."""
        q = len(mean)
        return cls(np.asarray(mean, np.float64), float(sigma), np.eye(q) if C is None else np.asarray(C, np.float64),
                   np.zeros(q), np.zeros(q))

    def tensors(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        arrays = {n: torch.from_numpy(getattr(self, n)) for n in ("mean", "C", "pc", "ps")}
        return {**arrays, "sigma": self.sigma, "told": self.told}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Search:
        """What `tensors` gave."""
        return cls(**{n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in kept.items()})

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """B and the square roots d of C's eigenvalues: C = B d^2 B^T."""
        values, b = np.linalg.eigh(self.C)
        return b, np.sqrt(np.maximum(values, 1e-20))

    def ask(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """z ~ N(mean, sigma^2 C), [samples, q]."""
        b, d = self.axes
        return self.mean + self.sigma * (rng.standard_normal((samples, len(self.mean))) * d) @ b.T

    def clipped(self, points: np.ndarray) -> np.ndarray:
        """Points from elsewhere, none farther than sqrt(q) + 2 q / (q + 2) by Mahalanobis (as pycma injects them)."""
        b, d = self.axes
        q = len(self.mean)
        far = np.linalg.norm((points - self.mean) @ b / d, axis=1) / self.sigma / (q**0.5 + 2 * q / (q + 2))
        return self.mean + (points - self.mean) / np.maximum(far, 1.0)[:, None]

    def tell(self, points: np.ndarray, fitness: Sequence[float], weights: np.ndarray) -> Search:
        """One update of mean, paths, C and sigma; the lower the fitness, the higher the rank."""
        q, t = len(self.mean), self.told + 1
        mu_eff = 1 / float((weights**2).sum())
        cs, cc, c1, cmu, damps = constants(q, mu_eff)
        y = (points[np.argsort(fitness, kind="stable")] - self.mean) / self.sigma  # [samples, q], the best first
        step = weights @ y
        b, d = self.axes
        # p_s <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu_eff) C^(-1/2) step
        ps = (1 - cs) * self.ps + np.sqrt(cs * (2 - cs) * mu_eff) * (b @ ((b.T @ step) / d))
        on = float(ps @ ps / q / (1 - (1 - cs) ** (2 * t)) < 2 + 4 / (q + 1))
        pc = (1 - cc) * self.pc + on * np.sqrt(cc * (2 - cc) * mu_eff) * step
        lost = c1 * (1 - on) * cc * (2 - cc)
        # C <- (1 - c_1 - c_mu) C + c_1 p_c p_c^T + c_mu sum_i w_i y_i y_i^T
        C = (1 + lost - c1 - cmu) * self.C + c1 * np.outer(pc, pc) + cmu * (y.T * weights) @ y
        expected = 2**0.5 * math.exp(math.lgamma((q + 1) / 2) - math.lgamma(q / 2))  # E ||N(0, I)||
        sigma = self.sigma * float(np.exp(min(1.0, cs / damps * (np.linalg.norm(ps) / expected - 1))))
        return Search(self.mean + self.sigma * step, sigma, (C + C.T) / 2, pc, ps, t)

    def with_sigma(self, sigma: float) -> Search:
        """The same search with another step size."""
        return replace(self, sigma=float(sigma))


def constants(q: int, mu_eff: float) -> tuple[float, float, float, float, float]:
    """c_s, c_c, c_1, c_mu and d_s as the tutorial has them."""
    cs = (mu_eff + 2) / (q + mu_eff + 5)
    c1 = 2 / ((q + 1.3) ** 2 + mu_eff)
    cmu = min(1 - c1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((q + 2) ** 2 + mu_eff))
    return (cs, (4 + mu_eff / q) / (q + 4 + 2 * mu_eff / q), c1, cmu,
            1 + 2 * max(0.0, ((mu_eff - 1) / (q + 1)) ** 0.5 - 1) + cs)

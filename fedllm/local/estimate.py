"""Estimators that learn from asked losses alone: SPSA, a policy gradient over tokens, Bayesian optimization.

Each has a shared state of plain arrays, a client's search over it that asks for losses at points, and a way to merge
what clients found. A point is a vector of R^q, or for `Policy` one candidate's number for each place of a prompt.
Sources: Spall (IEEE TAC 1992); Oh et al., BlackVIP, CVPR 2023, arXiv 2303.14773; Diao et al., BDPL, TMLR 2023,
arXiv 2201.08531; Chen et al., InstructZero, arXiv 2306.03082.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Tree

Arrays = Mapping[str, np.ndarray]
Asked = Callable[[np.ndarray], Sequence[float]]
"""Points [m, ...] -> their m losses, all on the same rows; the next call is the next batch."""


class Estimator(Protocol):
    """How a round learns from losses."""

    @property
    def asks(self) -> int:
        """Points that one client asks for in a round, at most."""
        ...

    def start(self) -> Arrays:
        """The shared state before the first round."""
        ...

    def search(self, shared: Arrays, ask: Asked, rng: np.random.Generator, round: int,
               memory: MutableMapping[str, Any]) -> Arrays:
        """A client's work in a round; `memory` is its own."""
        ...

    def merge(self, shared: Arrays, found: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
        """The next shared state."""
        ...

    def best(self, shared: Arrays) -> np.ndarray:
        """The point that the shared state stands for."""
        ...


def shapes(found: Arrays, since: int = 0) -> dict[str, tuple[int, ...]]:
    """Name -> sizes from this axis on."""
    return {n: a.shape[since:] for n, a in found.items()}


def mean_of(shared: Arrays, found: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """The weighted mean, name by name; PayloadError for other names or shapes than the shared state has."""
    for one in found:
        if shapes(one) != shapes(shared):
            raise PayloadError(f"a client found {shapes(one)}, and {shapes(shared)} is allowed")
    w = np.asarray(weights, np.float64) / sum(weights)
    return {n: np.tensordot(w, np.stack([f[n] for f in found]), 1) for n in found[0]}


@dataclass(frozen=True)
class Spsa:
    """SPSA with gradient correction: every entry is disturbed at once, and momentum looks one step ahead."""

    q: int
    steps: int = 5
    average: int = 5
    lr: float = 0.01
    c: float = 0.01
    momentum: float = 0.9

    @property
    def asks(self) -> int:
        return 2 * self.average * self.steps

    def start(self) -> Arrays:
        return {"z": np.zeros(self.q)}

    def search(self, shared: Arrays, ask: Asked, rng: np.random.Generator, round: int,
               memory: MutableMapping[str, Any]) -> Arrays:
        z, m = shared["z"].copy(), memory.get("momentum", torch.zeros(self.q, dtype=torch.float64)).numpy()
        for t in range(round * self.steps + 1, (round + 1) * self.steps + 1):  # from 1: c_0 would divide by zero
            a_t, c_t = self.lr / (t + 1) ** 0.4, self.c / t**0.1
            g = self.gradient(z, ask, rng, c_t)
            m = self.momentum * m + g
            z = z - a_t * (g + self.momentum * m)
        memory["momentum"] = torch.from_numpy(m)
        return {"z": z}

    def gradient(self, z: np.ndarray, ask: Asked, rng: np.random.Generator, c: float) -> np.ndarray:
        """Mean over draws of (L(z + c D) - L(z - c D)) / (2 c D), entry by entry, with |D_j| ~ U[0.5, 1]."""
        size = (self.average, self.q)
        d = rng.choice([-1.0, 1.0], size) * rng.uniform(0.5, 1.0, size)
        loss = np.asarray(ask(np.concatenate([z + c * d, z - c * d])))
        up, down = loss[: self.average], loss[self.average :]
        return ((up - down)[:, None] / (2 * c * d)).mean(0)

    def merge(self, shared: Arrays, found: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
        return mean_of(shared, found, weights)

    def best(self, shared: Arrays) -> np.ndarray:
        return shared["z"]


@dataclass(frozen=True)
class Policy:
    """A categorical over candidates for each of n places, moved by the losses of prompts that were drawn from it."""

    n: int
    candidates: int
    steps: int = 5
    samples: int = 20
    lr: float = 0.01
    spread: bool = False
    """Give entries that were not drawn -1/p, as BDPL's code does; the score function has 0 there."""

    @property
    def asks(self) -> int:
        return self.samples * self.steps

    def start(self) -> Arrays:
        return {"p": np.full((self.n, self.candidates), 1 / self.candidates)}

    def search(self, shared: Arrays, ask: Asked, rng: np.random.Generator, round: int,
               memory: MutableMapping[str, Any]) -> Arrays:
        p = onto_simplex(shared["p"])
        for _ in range(self.steps):
            u = rng.random((self.samples, self.n, 1))
            picks = np.minimum((p.cumsum(1)[None] < u).sum(2), self.candidates - 1)  # [I, n]
            p = onto_simplex(p - self.lr * self.gradient(p, picks, ask(picks)))
        return {"p": p}

    def gradient(self, p: np.ndarray, picks: np.ndarray, losses: Sequence[float]) -> np.ndarray:
        """1 / (I - 1) sum_k (l_k - mean l) d log p(picks_k) / dp, [n, candidates]."""
        drawn = np.eye(self.candidates)[picks]  # [I, n, candidates]
        score = (2 * drawn - 1 if self.spread else drawn) / np.maximum(p, 1e-6)
        lead = np.asarray(losses) - np.mean(losses)
        return np.tensordot(lead, score, 1) / (len(picks) - 1)

    def merge(self, shared: Arrays, found: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
        return mean_of(shared, found, weights)  # rows of probabilities stay rows of probabilities

    def best(self, shared: Arrays) -> np.ndarray:
        return shared["p"].argmax(1)


def onto_simplex(p: np.ndarray) -> np.ndarray:
    """The nearest rows of probabilities (Duchi et al., ICML 2008)."""
    down = -np.sort(-p, axis=1)
    over = (down.cumsum(1) - 1) / np.arange(1, p.shape[1] + 1)
    last = (down > over).sum(1) - 1  # the last entry that stays above its threshold
    return np.maximum(p - np.take_along_axis(over, last[:, None], 1), 0.0)


@dataclass(frozen=True)
class Bayes:
    """A Gaussian process over all that anybody asked says where a lower loss is to be expected.

    The shared state is the observations: points [m, q], and how much more each lost than the origin on the same rows.
    """

    q: int
    steps: int = 3
    radius: float = 1.0
    """Standard deviation of the points that are considered."""
    considered: int = 512

    @property
    def asks(self) -> int:
        return 2 * self.steps

    def start(self) -> Arrays:
        return {"z": np.zeros((1, self.q)), "y": np.zeros(1)}

    def search(self, shared: Arrays, ask: Asked, rng: np.random.Generator, round: int,
               memory: MutableMapping[str, Any]) -> Arrays:
        zs, ys = shared["z"], shared["y"]
        for _ in range(self.steps):
            z = self.propose(zs, ys, rng)
            lost, origin = ask(np.stack([z, np.zeros(self.q)]))
            zs, ys = np.vstack([zs, z]), np.append(ys, lost - origin)
        return {"z": zs[-self.steps :], "y": ys[-self.steps :]}

    def propose(self, zs: np.ndarray, ys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Of random points, half of them near the best, the one of the largest expected improvement."""
        far = self.radius * rng.standard_normal((self.considered, self.q))
        if len(zs) <= 2:
            return far[0]
        gp = posterior(zs, ys)
        known = gp.predict(zs)
        half = self.considered // 2
        far[:half] = zs[known.argmin()] + 0.3 * far[:half]
        return far[expected_improvement(*gp.predict(far, return_std=True), float(known.min())).argmax()]

    def merge(self, shared: Arrays, found: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
        for one in found:
            if shapes(one, 1) != shapes(shared, 1) or len(one["z"]) != len(one["y"]):
                raise PayloadError(f"a client found {shapes(one)}, and z [m, {self.q}] with y [m] is allowed")
        return {n: np.concatenate([shared[n], *(f[n] for f in found)]) for n in shared}

    def best(self, shared: Arrays) -> np.ndarray:
        zs, ys = shared["z"], shared["y"]
        return zs[0] if len(zs) <= 2 else zs[posterior(zs, ys).predict(zs).argmin()]


def posterior(zs: np.ndarray, ys: np.ndarray, **options: Any) -> Any:
    """A Gaussian process (Matern 5/2 and noise) through the observations, of the likeliest scales."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0) * Matern(zs.shape[1] ** 0.5, nu=2.5) + WhiteKernel(0.1, (1e-6, 1e1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scales at the end of their range are no news to whoever asks for losses
        return GaussianProcessRegressor(kernel, normalize_y=True, **options).fit(zs, ys)


def expected_improvement(mean: np.ndarray, std: np.ndarray, best: float) -> np.ndarray:
    """E max(0, best - f) for f ~ N(mean, std^2)."""
    from scipy.stats import norm

    std = np.maximum(std, 1e-12)
    u = (best - mean) / std
    return (best - mean) * norm.cdf(u) + std * norm.pdf(u)


def arrays(tree: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as fp64 arrays."""
    return {n: t.double().numpy() for n, t in tree.items()}


def tensors(found: Arrays) -> Tree:
    """Arrays as fp64 tensors, for states."""
    return {n: torch.from_numpy(np.asarray(a, np.float64)) for n, a in found.items()}

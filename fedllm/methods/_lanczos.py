"""Stochastic Lanczos quadrature: how the eigenvalues of a symmetric map are spread, by products with it alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedllm.core.payload import Tree
from fedllm.local.perturb import flat, unflat

Map = Callable[[np.ndarray], np.ndarray]


def spectrum(product: Map, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues, weights that add up to 1) of at most so many nodes, from one probe vector; fully orthogonalized.

    Golub and Meurant: with T = V^T A V, T's eigenvalues are the nodes and the squared first entries of its
    eigenvectors the weights. With as many steps as dimensions the nodes are A's own eigenvalues.
    """
    basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(steps, len(start))):
        w = product(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        for _ in range(2):  # twice is enough
            for v in basis:
                w = w - (w @ v) * v
        beside.append(float(np.linalg.norm(w)))
        if beside[-1] <= 1e-10 * max(1.0, abs(diagonal[0])):
            break
        basis.append(w / beside[-1])
    off = beside[: len(diagonal) - 1]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return values, vectors[0] ** 2


def share_above(values: np.ndarray, weights: np.ndarray, step: float = 0.1, still: float = 0.005) -> float:
    """FedPepTAO's r: 1 - CDF(t) for t = 0, step, ... until it moves by less than `still` three times in a row; where
    it falls below half of what it was at 0 first, with half of the step again from 0."""
    above = lambda t: float(weights[values > t].sum())  # noqa: E731
    first = above(0.0)
    while step > 1e-9:
        t, last, calm = 0.0, first, 0
        while last >= first / 2:
            t += step
            now = above(t)
            calm = calm + 1 if abs(now - last) < still else 0
            last = now
            if calm == 3:
                return last
        step /= 2
    return first


def curvature(gradient: Callable[[Tree], Tree], theta: Tree, rng: np.random.Generator, steps: int,
              small: float = 1e-2) -> tuple[np.ndarray, np.ndarray]:
    """The spectrum of the Hessian at `theta`: H v is (g(x + e v) - g(x - e v)) / 2 e, from two gradients."""
    x = flat(theta)

    def product(v: np.ndarray) -> np.ndarray:
        away = torch.from_numpy(v).to(x) * small
        ahead, back = (flat(gradient(unflat(at, theta))).double().numpy() for at in (x + away, x - away))
        return (ahead - back) / (2 * small)

    return spectrum(product, rng.choice([-1.0, 1.0], len(x)), steps)

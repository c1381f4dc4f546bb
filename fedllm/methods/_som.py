"""A self-organizing map over clients' weights, and how typical of it each client is."""

from __future__ import annotations

import numpy as np


def organized(w: np.ndarray, grid: tuple[int, int], sigma: float, rng: np.random.Generator, passes: int = 20
              ) -> np.ndarray:
    """Cells [rows * columns, d] of a map of the vectors w [K, d] (Kohonen 1982): the nearest cell and its neighbors
    move towards each vector, and the neighborhood shrinks from pass to pass."""
    places = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"), -1).reshape(-1, 2)
    cells = np.repeat(w.mean(0, keepdims=True), len(places), 0) + 1e-3 * w.std() * rng.normal(0, 1, (len(places), 1))
    for t in range(passes):
        width, rate = sigma * np.exp(-t / passes), 0.5 * (1 - t / passes)
        for k in rng.permutation(len(w)):
            best = places[((cells - w[k]) ** 2).sum(1).argmin()]
            near = np.exp(-((places - best) ** 2).sum(1) / (2 * width**2))  # exp(-dist^2 / (2 sigma^2))
            cells += rate * near[:, None] * (w[k] - cells)
    return cells


def typical(w: np.ndarray, whole: np.ndarray, cells: np.ndarray, sigma: float) -> np.ndarray:
    """Weights [K] that sum to 1: sum over cells of exp(-|cell - w_k| / (2 sigma^2)) times (cos(w_k, w) + 1) / 2.

    Distances are in units of the clients' mean distance to the map, so that they do not hang on the model's size.
    """
    gap = np.sqrt(((w[:, None] - cells[None]) ** 2).sum(-1))  # [K, cells]
    gap = gap / max(float(gap.mean()), 1e-12)
    cos = w @ whole / np.maximum(np.linalg.norm(w, axis=1) * np.linalg.norm(whole), 1e-12)
    each = np.exp(-gap / (2 * sigma**2)).sum(1) * (cos + 1) / 2
    return each / each.sum() if each.sum() > 0 else np.full(len(w), 1 / len(w))

"""Who holds how much of what: shard sizes and category counts under Dirichlet skew."""

from __future__ import annotations

import numpy as np

LEAST_ROWS = 8  # no client is left with less than half a batch, unless the federation itself is smaller
BALANCE_ROUNDS = 200  # far more than iterative proportional fitting needs on tables this small


def shard_sizes(clients: int, total: int, concentration: float | None, seed: int) -> list[int]:
    """Split `total` rows over clients; no client gets less than `LEAST_ROWS` while there are enough."""
    if concentration is None:
        return _round(np.full(clients, total / clients), total).tolist()
    rng = np.random.default_rng([seed, 1])
    shares = rng.dirichlet(np.full(clients, concentration))
    least = min(LEAST_ROWS, total // clients)
    rest = total - least * clients
    return (least + _round(shares * rest, rest)).tolist()


def category_counts(sizes: list[int], categories: int, concentration: float | None, seed: int) -> list[list[int]]:
    """How many rows of each category each client holds, row by row.

    Each category is spread over clients by a Dirichlet draw; the table is then balanced so that clients keep their
    sizes and categories stay equally common over the whole federation.
    """
    clients, total = len(sizes), sum(sizes)
    table = np.ones((clients, categories))
    if concentration is not None:
        rng = np.random.default_rng([seed, 2])
        # The floor keeps the table balanceable when a harsh draw underflows to zero.
        table = np.maximum(rng.dirichlet(np.full(clients, concentration), size=categories).T, 1e-6)
    for _ in range(BALANCE_ROUNDS):
        table *= (total / categories) / table.sum(axis=0, keepdims=True)
        table *= np.asarray(sizes)[:, None] / table.sum(axis=1, keepdims=True)
    return [_round(row, size).tolist() for row, size in zip(table, sizes, strict=True)]


def _round(values: np.ndarray, total: int) -> np.ndarray:
    """Round to whole numbers that add up to `total`: the largest remainders go up."""
    whole = np.floor(values).astype(int)
    short = total - int(whole.sum())
    # Ties are broken by position, from a stable sort, so that the same seed always gives the same table.
    whole[np.argsort(-(values - whole), kind="stable")[:short]] += 1
    return whole

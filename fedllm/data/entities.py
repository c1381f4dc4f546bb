"""Parts of things at several clients: which things are kept back, the same at every client and at every site."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedllm.core.rng import seed_of
from fedllm.tasks.row import Row


def kept_back(rows: Sequence[Row], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept back, left), indices in the rows' order: a thing is kept back by its id and the seed, whoever holds parts
    of it, so that what is a test at one client is learned at none."""
    out = np.array([seed_of(seed, "data.entity", str(row["id"])) < fraction * 2**63 for row in rows], dtype=bool)
    at = np.arange(len(rows))
    return at[out], at[~out]

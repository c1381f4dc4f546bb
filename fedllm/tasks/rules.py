"""Rules without a model, which a field holds its models against: each learns from rows by counting or least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedllm.tasks.row import Encoded

Rule = Callable[[Sequence[Encoded], Sequence[Encoded]], np.ndarray]
"""(rows to learn from, rows to say something of) -> what it says of each [N, ...]."""
RIDGE = 1e-3
"""Of the sum of squares, so that least squares are defined for few rows."""


def persistence(train: Sequence[Encoded], test: Sequence[Encoded]) -> np.ndarray:
    """Every later step is as the last that was seen [N, H]."""
    return np.stack([np.full(len(e.parts["future"]), e.parts["past"][-1, int(e.labels)], float) for e in test])


def linear_ar(train: Sequence[Encoded], test: Sequence[Encoded]) -> np.ndarray:
    """Each later step is a linear function of the variable's own past steps, by least squares [N, H]."""
    x, later = _own_past(train), np.stack([e.parts["future"][:, int(e.labels)] for e in train]).astype(float)
    gram = x.T @ x
    w = np.linalg.solve(gram + RIDGE * len(x) * np.eye(len(gram)), x.T @ later)  # [L + 1, H]
    return _own_past(test) @ w


def _own_past(rows: Sequence[Encoded]) -> np.ndarray:
    """[N, L + 1], the last column ones."""
    past = np.stack([e.parts["past"][:, int(e.labels)] for e in rows]).astype(float)
    return np.concatenate([past, np.ones((len(past), 1))], 1)

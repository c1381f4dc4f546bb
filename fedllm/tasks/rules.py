"""Rules without a model, which a field holds its models against: each learns from rows by counting or least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedllm.tasks.row import Encoded

Rule = Callable[..., np.ndarray]
"""(rows to learn from, rows to say something of, and where these are ranked how many items) -> what it says of each."""
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


def popularity(train: Sequence[Encoded], test: Sequence[Encoded], items: int) -> np.ndarray:
    """An item's score is how often it was taken [N, items]."""
    return np.tile(_taken(train, items), (len(test), 1))


def item_knn(train: Sequence[Encoded], test: Sequence[Encoded], items: int) -> np.ndarray:
    """An item's score is the sum of its cosines with the history's items, by who took both (Sarwar 2001)
    [N, items]."""
    both = np.zeros((items, items))
    for row in train:  # of all rows of a user, each pair of its items is met once: the later as what came next
        for i in set(row.parts["history"].tolist()):
            both[i, int(row.labels)] += 1.0
    both += both.T
    often = np.maximum(1.0, _taken(train, items))
    near = both / np.sqrt(often[:, None] * often)
    np.fill_diagonal(near, 0.0)
    return np.stack([near[row.parts["history"]].sum(0) for row in test])


def _taken(train: Sequence[Encoded], items: int) -> np.ndarray:
    """How often each item came next, and how often it was the first of all [items]."""
    first = [int(row.parts["history"][0]) for row in train if len(row.parts["history"]) == 1]
    return np.bincount([*(int(row.labels) for row in train), *first], minlength=items).astype(float)

"""Turns rows into token arrays, once per client, and deals them into batches whose lengths agree across clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import DataError, RecipeError
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import IGNORE, Encoded, Row, same_form
from fedllm.tasks.task import How

__all__ = ["IGNORE", "Encoded", "batches", "encode_row", "encode_rows"]
BUCKET = 64
"""Batches that are sorted by length together: enough to pad little, few enough that batches differ between epochs."""
GOLDEN = (5**0.5 - 1) / 2


def encode_row(row: Row, tokenizer: Any, task: str, max_length: int, completion_only: bool = True) -> Encoded:
    """One row as tokens; see `encode_rows`, which is many times as fast for many."""
    return encode_rows([row], tokenizer, task, max_length, completion_only)[0]


def encode_rows(rows: Sequence[Row], tokenizer: Any, task: str, max_length: int, completion_only: bool = True,
                images: Any = None, *, every_turn: bool = True, whole: int | None = None) -> list[Encoded]:
    """All rows as the task reads them (`Task.encode`, `How`); a DataError names a row that cannot be used."""
    how = How(tokenizer, max_length, completion_only, images, every_turn, whole)
    out = task_of(task).encode(rows, how) if rows else []
    same_form(out)
    return out


def batches(lengths: Sequence[int] | np.ndarray, batch_size: int, rng_client: np.random.Generator,
            rng_shared: np.random.Generator, *, steps: int | None = None, epochs: int | None = None
            ) -> list[np.ndarray]:
    """The row indices of each step's batch: short rows with short, and all clients of a round short at the same time.

    `rng_client` shuffles each epoch. `rng_shared` must start in the same state for every client of the round: it draws
    the length rank wanted at each step, so that clients' batches pad little side by side. Give `steps` (epochs follow
    each other as needed, each visiting every row once) or `epochs`. Pure: equal lengths and generators, equal batches.
    """
    n = len(lengths)
    if n == 0:
        raise DataError("a client with no rows cannot be dealt into batches")
    if batch_size < 1 or (steps is None) == (epochs is None) or (steps or epochs or 0) < 1:
        raise RecipeError(f"batch_size = {batch_size}, steps = {steps}, epochs = {epochs}: allowed is a batch_size "
                          "from 1 up, and either steps or epochs from 1 up")
    per_epoch = -(-n // batch_size)
    total = steps or (epochs or 0) * per_epoch
    # Steps of the golden ratio: any stretch of them is even over [0, 1), so that epochs of any length, which begin and
    # end at other steps in each client, still find short and long batches wanted in proportion.
    wanted = (rng_shared.random() + GOLDEN * np.arange(total + per_epoch)) % 1.0
    out: list[np.ndarray] = []
    while len(out) < total:
        out.extend(_epoch(np.asarray(lengths), batch_size, rng_client, wanted[len(out) : len(out) + per_epoch]))
    return out[:total]


def _epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator, wanted: np.ndarray) -> list[np.ndarray]:
    """One visit to every row; `wanted` [batches] is the length rank in [0, 1) that each step should have."""
    order = rng.permutation(len(lengths))
    count = np.full(len(wanted), batch_size)
    # Sorted rows are cut in order, so a short last batch would always be the longest rows: it falls anywhere instead.
    count[rng.integers(len(wanted))] -= batch_size * len(wanted) - len(lengths)
    ends = np.cumsum(count)
    out: list[np.ndarray] = []
    for steps in np.array_split(np.arange(len(wanted)), -(-len(wanted) // BUCKET)):
        rows = order[ends[steps[0]] - count[steps[0]] : ends[steps[-1]]]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = np.split(rows, np.cumsum(count[steps])[:-1])
        # The step that wants the k-th shortest rows of this bucket gets its k-th batch.
        out.extend(cut[k] for k in np.argsort(np.argsort(wanted[steps])))
    return out

"""Pooled states of rows, computed once where nothing but the classifier above them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedllm.data.encode import Encoded
from fedllm.models.batch import collate
from fedllm.tasks.task import wide

CHUNK = 64
"""Rows that pass through the body together: those of one reading, the short with the short, so that a row's state
follows from whose rows it stands among and from nothing else (a site and a simulation compute the same)."""
MOST = 1 << 28
"""Bytes of states that one reading may leave; rows of a larger one pass through the body each time."""


def part_of(model: Any) -> str:
    """The part of a row that is its pooled state [d] under this model, and under no other."""
    return f"state {id(model)}"


def is_settled(model: Any) -> bool:
    """Whether nothing below the classifier is trained, and it reads one state of each row of words."""
    return model.rules.net == "pooled" and all(n.startswith("classifier.") for n in model.initial())


def with_states(model: Any, rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows with their states, where they are not there yet."""
    out = list(rows)
    new = sorted((i for i, row in enumerate(rows) if not row.parts), key=lambda i: len(rows[i].ids))
    width = model.net.classifier.in_features
    if 4 * width * len(new) > MOST:
        return out
    for at in (new[i : i + CHUNK] for i in range(0, len(new), CHUNK)):
        batch = collate([[rows[i] for i in at]], model.pad, model.device)
        with torch.no_grad(), model.using([{}]):
            states = wide(model.pooled(batch)).cpu().numpy()
        for i, state in zip(at, states, strict=True):
            out[i] = replace(rows[i], parts={part_of(model): state})
    return out

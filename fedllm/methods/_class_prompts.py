"""What methods share that learn prompts of an image-text model: which space they need, whose classes are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.layer import name_of
from fedllm.models.names import AMONG


def need_space(method: str, model: Any, *kinds: type) -> None:
    """CompositionError for a model whose space is none of these kinds."""
    if type(model.space) not in kinds:
        names = [name_of(kind) for kind in kinds]
        raise CompositionError(f"method '{method}' and space '{model.space.stem}' do not fit together; with data.task "
                               f"= 'image_text' space = {' or '.join(map(repr, names))} works")


def one_task(method: str, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """DataError for clients that tell their rows among different classes: these methods learn one task."""
    first: tuple[str, tuple[float, ...]] | None = None
    for client, mine in rows.items():
        for row in mine:
            told = tuple(row.get(AMONG) or [1.0] * len(labels)) if isinstance(row, Mapping) else ()
            first = first or (client, told)
            if told != first[1]:
                said = [", ".join([n for n, t in zip(labels, some, strict=True) if t][:6]) for some in (first[1], told)]
                raise DataError(f"client '{first[0]}' tells pictures among {said[0]}, and client '{client}' among "
                                f"{said[1]}: method '{method}' learns one task of one class list; leave the column "
                                "'among' out of the training rows, or use 'fedtpg', whose clients may have lists of "
                                "their own")


def own_classes(rows: Sequence[Any], classes: int) -> np.ndarray:
    """Which classes a client's training rows are told among [C]: what they say, or the labels that they have."""
    told = np.zeros(classes, np.float32)
    for row in rows:
        if AMONG in row.parts:
            told = np.maximum(told, row.parts[AMONG])
        else:
            told[int(row.labels)] = 1
    return told

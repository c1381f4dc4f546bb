"""Label flipping: honest training on rows whose labels are wrong (Tolpegin et al., ESORICS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedllm.attacks._malicious import Poisoner
from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.data.encode import IGNORE, Encoded


@dataclass(frozen=True)
class AttLabelFlip(Poisoner):
    """Tolpegin, Truex, Gursoy, Liu, Data Poisoning Attacks against Federated Learning Systems, arXiv 2007.08432.

    Classification: `sources[i]` becomes `targets[i]`; without them every label becomes the next one. Generation:
    every row gets the response of the row after it.
    """

    sources: tuple[int, ...] = knob((), "labels (by index) that are flipped; none: all")
    targets: tuple[int, ...] = knob((), "what they become, in the same order")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sources) != len(self.targets) or len(set(self.sources)) != len(self.sources):
            raise RecipeError(f"AttLabelFlip.sources = {list(self.sources)} and targets = {list(self.targets)} are not "
                              "allowed; they must be of one length, and no source twice")

    def poison(self, rows: Sequence[Encoded], client: Any) -> list[Encoded]:
        if rows and isinstance(rows[0].labels, np.ndarray):
            return [answered(row, other) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
        classes = len(client.model.labels)
        flips = dict(zip(self.sources, self.targets, strict=True)) or {i: (i + 1) % classes for i in range(classes)}
        if bad := [i for i in (*flips, *flips.values()) if not 0 <= i < classes]:
            raise RecipeError(f"layer 'att_label_flip': label {bad[0]} does not exist; the data has 0 to {classes - 1}")
        return [replace(row, labels=flips.get(int(row.labels), int(row.labels))) for row in rows]


def answered(row: Encoded, other: Encoded) -> Encoded:
    """A generation row's prompt with the other row's response, cut to the longer of the two."""
    mine, theirs = row.prompt, other.ids[len(other.prompt):]
    ids = np.concatenate([mine, theirs])[: max(len(row.ids), len(other.ids))].astype(np.int32)
    labels = ids.astype(np.int64)
    labels[: min(len(mine), len(ids) - 1)] = IGNORE
    return Encoded(ids, labels, int((labels != IGNORE).sum()))

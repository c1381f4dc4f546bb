"""A padded batch for K lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.data.encode import Encoded

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows of lane k are [k*B, (k+1)*B); short lanes are filled with rows that count nothing."""

    k: int
    ids: Tensor  # [K*B, T] int64
    mask: Tensor  # [K*B, T] bool, False on padding
    labels: Tensor  # [K*B, T] token ids or IGNORE; for classification [K*B]

    @property
    def rows(self) -> int:
        return self.ids.shape[0] // self.k


def collate(lanes: Sequence[Sequence[Encoded]], pad: int, device: torch.device, left: bool = False) -> Batch:
    """Pad lanes of encoded rows to one rectangle, on the right (training) or on the left (generation)."""
    b, t = max(len(rows) for rows in lanes), max(len(e.ids) for rows in lanes for e in rows)
    n = len(lanes) * b
    ids = np.full((n, t), pad, np.int64)
    mask = np.zeros((n, t), bool)
    tokenwise = any(isinstance(e.labels, np.ndarray) for rows in lanes for e in rows)
    labels = np.full((n, t) if tokenwise else n, IGNORE, np.int64)
    for k, rows in enumerate(lanes):
        for j, e in enumerate(rows, k * b):
            at = slice(t - len(e.ids), t) if left else slice(len(e.ids))
            ids[j, at], mask[j, at] = e.ids, True
            if tokenwise:
                labels[j, at] = e.labels
            else:
                labels[j] = e.labels
        mask[k * b + len(rows) : (k + 1) * b, -1 if left else 0] = True  # an empty mask would make attention NaN
    return Batch(len(lanes), *(torch.from_numpy(x).to(device) for x in (ids, mask, labels)))

"""A padded batch for K lanes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.data.encode import IGNORE, Encoded

__all__ = ["IGNORE", "Batch", "collate"]


@dataclass(frozen=True)
class Batch:
    """Rows of lane k are [k*B, (k+1)*B); short lanes are filled with rows that count nothing."""

    k: int
    ids: Tensor  # [K*B, T] int64
    mask: Tensor  # [K*B, T] bool, False on padding
    labels: Tensor  # [K*B, T] token ids or IGNORE; where rows are labelled [K*B]
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # what is not text, by name: [K*B, ...]

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
    parts = {n: torch.from_numpy(x).to(device) for n, x in _parts(lanes, b).items()}
    return Batch(len(lanes), *(torch.from_numpy(x).to(device) for x in (ids, mask, labels)), parts)


def _parts(lanes: Sequence[Sequence[Encoded]], b: int) -> dict[str, np.ndarray]:
    """Each part of all rows in one array [K*B, ...]; rows that fill a lane are zeros, or what the part is padded with.

    A DataError names a part that some rows lack, or have in another shape.
    """
    rows = [(k * b + j, e) for k, lane in enumerate(lanes) for j, e in enumerate(lane)]
    like = next((e for _, e in rows if e.parts), None)
    if like is None:
        return {}
    for _, e in rows:
        if e.form != like.form:
            raise DataError(f"rows of one batch have unlike parts: {e.form} and {like.form} (name, type, shape); a "
                            "part has one shape in all rows")
    out = {}
    for name, part in like.parts.items():
        pad = like.pads.get(name)
        shape = part.shape if pad is None else (max(len(e.parts[name]) for _, e in rows), *part.shape[1:])
        out[name] = np.full((len(lanes) * b, *shape), pad or 0, part.dtype)
        for j, e in rows:
            out[name][(j, slice(len(e.parts[name]))) if pad is not None else j] = e.parts[name]
    return out

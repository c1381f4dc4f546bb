"""The coordinate-wise median: one wild client moves nothing (Yin et al., ICML 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload
from fedllm.core.reduce import check_same, wide


@dataclass(frozen=True)
class Median:
    """Median of every entry of every tensor, and of every number; unlike a sum it must hold all replies.

    Between two middle values it takes their mean. The result keeps the total weight under `n`.
    """

    def zero(self) -> list[Payload]:
        return []

    def add(self, acc: list[Payload], reply: Payload) -> list[Payload]:
        if acc:
            check_same(acc[0], reply)
        return [*acc, reply]

    def done(self, acc: list[Payload]) -> Payload:
        if not acc:
            raise PayloadError("a median needs one reply at least")
        out: dict[str, Any] = {}
        for key, first in acc[0].items():
            if isinstance(first, Tensor):
                out[key] = median(torch.stack([wide(r[key]) for r in acc])).to(wide(first).dtype)
            elif key == "n":
                out[key] = float(sum(r[key] for r in acc))
            else:
                out[key] = float(median(torch.tensor([float(r[key]) for r in acc], dtype=torch.float64)))
        return out


def median(stacked: Tensor) -> Tensor:
    """[K, ...] -> [...]: the middle, or the mean of the two middle ones."""
    k = stacked.shape[0]
    ordered = stacked.sort(0).values
    if stacked.is_floating_point():
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2
    return ordered[(k - 1) // 2]

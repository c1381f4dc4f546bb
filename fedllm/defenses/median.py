"""The coordinate-wise median: one wild client moves nothing (Yin et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.card import Card, Claim
from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload
from fedllm.core.reduce import check_same, wide
from fedllm.defenses._robust import Robust, Rows, Verdict

PLANTED = {"attack": {"name": "att_backdoor", "kind": "replacement", "trigger": (2, 3, 2, 3, 2, 3), "share": 0.8,
                      "clients": 0.1, "start": 8}, "rounds": 16}


@dataclass(frozen=True)
class Median:
    """Median of every entry of every tensor, and of every number; unlike a sum it must hold all replies.

    Between two middle values it takes their mean. The result keeps the total weight under `n`.
    """

    ragged: ClassVar[bool] = False

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


@dataclass(frozen=True)
class CoordinateMedian(Robust):
    """The same as a layer over any method that folds by a Sum. Equals flwr's FedMedian."""

    card = Card(
        title="Coordinate-wise median",
        paper="Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498",
        topic="defenses",
        sends="nothing new; the server sees every reply",
        needs="a method that folds by a Sum",
        claim=Claim("leaves a replaced model's trigger at most 15 %", rig="arena", metric="success", holds="<=",
                    threshold=0.15, seeds=3, options=PLANTED),
        also={"cost": Claim("loses at most 2 points of the main task under that attack", rig="arena", metric="lost",
                            holds="<=", threshold=0.02, seeds=3, options=PLANTED)},
        evidence="Where the trigger stays over 15 % (21 % in seed 1), the clean mean of that seed gives its answer to "
                 "13 % of the inputs: the trigger's tokens cover up the text. Multi-Krum leaves 12 % there.",
    )

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        return Verdict(median(rows.x))


def median(stacked: Tensor) -> Tensor:
    """[K, ...] -> [...]: the middle, or the mean of the two middle ones."""
    k = stacked.shape[0]
    ordered = stacked.sort(0).values
    if stacked.is_floating_point():
        return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2
    return ordered[(k - 1) // 2]

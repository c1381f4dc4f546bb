"""Distillation from a teacher's likeliest words alone: so many a target, each with its probability (FedMKT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class TopWords(Objective):
    """ce CE + (1 - ce) T^2 KL(teacher || student) at temperature T, target by target; the student's softmax is
    over all its words, so that mass it gives to none of the teacher's costs.

    Side: `words` [targets, k], the teacher's words, and `p` [targets, k], their probabilities (at T, summing to 1).
    With a `weight` the loss is CE + weight T^2 KL, whatever `ce` says (FedCoLLM).
    """

    needs: ClassVar[tuple[str, ...]] = ("words", "p")
    ce: float = knob(0.9, "share of the task's own loss", ge=0, le=1)
    temperature: float = knob(1.0, "softens both sides; the divergence is multiplied by its square", gt=0)
    weight: float | None = knob(None, "CE + weight KL in the place of shares; None: shares", ge=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, z, y = model.target_logits(batch)  # [M], [M, V], [M]
        own, theirs = (self.ce, 1 - self.ce) if self.weight is None else (1.0, self.weight)
        each = theirs * divergence(z, rows, len(batch.ids), side, self.temperature)
        if own:
            each = each + own * F.cross_entropy(z, y, reduction="none")
        count = rows.bincount(minlength=len(batch.ids)).to(each.dtype)
        return torch.zeros_like(count).index_add(0, rows, each), count


def divergence(z: Tensor, rows: Tensor, n: int, side: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at each target [M], over the teacher's words alone; z [M, V] are the student's logits
    and `rows` [M] says which of n rows a target is of."""
    count, words, p = rows.bincount(minlength=n), side["words"].long(), side["p"]
    if words.shape[1] < int(count.max()):
        raise DataError(f"objective 'top_words': side 'words' has {words.shape[1]} targets a row at most, and a row "
                        f"has {int(count.max())}; allowed is one set of words for each target")
    at = rows.new_ones(len(rows)).cumsum(0) - 1 - (count.cumsum(0) - count)[rows]
    words, p = words[rows, at], p[rows, at].to(z.dtype)  # [M, k]
    q = (z / temperature).log_softmax(-1).gather(1, words)
    return temperature**2 * (torch.xlogy(p, p) - p * q).sum(-1)


@dataclass(frozen=True)
class Told:
    """For `client.measure`: of each row its summed cross-entropy, then k words and k probabilities for each of `most`
    targets [N, 1 + 2 most k]; rows with fewer end in zeros."""

    k: int
    most: int
    temperature: float = 1.0

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        rows, z, y = model.target_logits(batch)
        n, k = len(batch.ids), min(self.k, z.shape[1])
        count = rows.bincount(minlength=n)
        at = rows.new_ones(len(rows)).cumsum(0) - 1 - (count.cumsum(0) - count)[rows]
        top, words = (z / self.temperature).topk(k, -1)
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        told = torch.zeros(n, 2, self.most, k, dtype=wide, device=z.device)
        told[rows, 0, at], told[rows, 1, at] = words.to(wide), top.softmax(-1).to(wide)
        ce = F.cross_entropy(z, y, reduction="none").to(wide)
        return torch.cat([ce.new_zeros(n).index_add(0, rows, ce)[:, None], told.flatten(1)], 1)

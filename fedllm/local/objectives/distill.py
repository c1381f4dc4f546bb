"""Distillation: say what a teacher says, by its logits or probabilities (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Distill(Objective):
    """(1 - ce) T^2 KL(teacher || student) at temperature T, and ce times the task's own loss, target by target.

    Side `teacher`: the teacher's logits (or probabilities) at a row's targets, [targets, V], or [classes] where a row
    has one label.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    temperature: float = knob(1.0, "softens both sides; the loss is multiplied by its square", gt=0)
    ce: float = knob(0.0, "share of the task's own loss", ge=0, le=1)
    given: Literal["logits", "probabilities"] = knob("logits", "what the teacher's numbers are",
                                                     options=("logits", "probabilities"))

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, z, y = model.target_logits(batch)  # [M], [M, V], [M]
        count = rows.bincount(minlength=len(batch.ids))
        t = side["teacher"]
        if t.dim() == 3:  # [N, targets, V]: the j-th target of its row
            if t.shape[1] < int(count.max()):
                raise DataError(f"objective '{self.name}': side 'teacher' has {t.shape[1]} targets a row at most, and "
                                f"a row has {int(count.max())}; allowed is one vector for each target")
            firsts = count.cumsum(0) - count
            t = t[rows, rows.new_ones(len(rows)).cumsum(0) - 1 - firsts[rows]]
        else:
            t = t[rows]
        if t.shape[-1] != z.shape[-1]:
            raise DataError(f"objective '{self.name}': side 'teacher' tells of {t.shape[-1]} tokens or classes, and "
                            f"the model has {z.shape[-1]}")
        t = t.to(z.dtype) if self.given == "logits" else t.to(z.dtype).clamp_min(1e-30).log()
        s, t = (z / self.temperature).log_softmax(-1), (t / self.temperature).log_softmax(-1)
        each = (1 - self.ce) * self.temperature**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
        if self.ce:
            each = each + self.ce * F.cross_entropy(z, y, reduction="none")
        return each.new_zeros(len(batch.ids)).index_add(0, rows, each), count.to(each.dtype)


def teacher_logits(model: Model, batch: Batch) -> Tensor:
    """For `client.measure` on classification rows: a teacher's logits, [N, classes]."""
    return model.class_logits(batch)


def targets(row: Any) -> int:
    """Tokens of a row that are to be said."""
    return int((np.asarray(row.labels)[1:] >= 0).sum())


@dataclass(frozen=True)
class Words:
    """A teacher's logits at every target of each row [N, longest * V]; where a row has fewer, zeros."""

    longest: int

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        rows, z, _ = model.target_logits(batch)
        count = rows.bincount(minlength=len(batch.ids))
        out = z.new_zeros(len(batch.ids), self.longest, z.shape[-1])
        out[rows, torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]] = z
        return out.flatten(1)

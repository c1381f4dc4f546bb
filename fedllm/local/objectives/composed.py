"""Composed knowledge: say of a row what the shared centroids nearest to it say (FedKC, WWW 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Composed(Objective):
    """CE + lam KL(t || softmax(z)); side `target` [C] is what was composed for the row, and no gradient goes there."""

    needs: ClassVar[tuple[str, ...]] = ("target",)
    lam: float = knob(1.0, "weight of the agreement", ge=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        z, good = model.class_logits(batch), batch.labels != IGNORE
        ce = F.cross_entropy(z, batch.labels.clamp(min=0), reduction="none")
        kl = F.kl_div(z.log_softmax(-1), side["target"].to(z), reduction="none").sum(-1)
        return (ce + self.lam * kl) * good, good.to(z.dtype)

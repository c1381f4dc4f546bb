"""A second head beside the classifier: both read the same pooled state, and share the loss between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model
from fedllm.spaces.mlp_head import mapped

DOWN, UP = "adapter.down", "adapter.up"
"""Names of the second head's maps among the trainables: d -> a and a -> C."""


@dataclass(frozen=True)
class Beside(Objective):
    """mu CE(A(r)) + (1 - mu) CE(H(r)), r the pooled state, H the classifier and A(r) = U (D r + d) + u (pFedLoRA)."""

    mu: float = knob(0.5, "share of the second head", ge=0, le=1)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        r = model.net.pool(model.hidden(batch), batch.mask)
        good = batch.labels != IGNORE
        y, each = batch.labels.clamp(min=0), r.new_zeros(len(r))
        if self.mu > 0:
            each = each + self.mu * F.cross_entropy(adapted(model, r), y, reduction="none")
        if self.mu < 1:
            each = each + (1 - self.mu) * F.cross_entropy(model.net.classifier(r), y, reduction="none")
        return each * good, good.to(each.dtype)


def adapted(model: Model, r: Tensor) -> Tensor:
    """What the second head says of pooled states [N, d]: [N, C]."""
    return mapped(mapped(r, DOWN, model.stack), UP, model.stack)

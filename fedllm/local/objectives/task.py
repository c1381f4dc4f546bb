"""The task's own loss: cross-entropy over what is learned of a row. What every fit descends unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Task(Objective):
    """-log p of a row's targets."""

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        total, count, _ = model.row_losses(batch)
        return total, count


def row_sums(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: each row's summed loss, and how many targets it sums over [N, 2], in fp64."""
    total, count, _ = model.row_losses(batch)
    return torch.stack([total.double(), count.double()], 1)

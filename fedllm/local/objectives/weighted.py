"""The task's own loss of rows that do not count alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Weighted(Objective):
    """w CE; side `weight`, a number a row. It weighs the row's loss and not its count: half a weight is half a step."""

    needs: ClassVar[tuple[str, ...]] = ("weight",)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        total, count, _ = model.row_losses(batch)
        return side["weight"].to(total.dtype) * total, count

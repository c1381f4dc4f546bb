"""Ascent with a bound: rows are unlearned until the model finds them as unlikely as it is told to, and no further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Ascent(Objective):
    """max(0, bound - CE) of each row, CE its mean loss per target: no gradient where it has come to the bound."""

    bound: float = knob(3.0, "loss per target beyond which a row is left alone", gt=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        total, count, _ = model.row_losses(batch)
        return (self.bound * count - total).clamp(min=0), count

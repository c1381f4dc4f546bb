"""Two modalities' features of the same row are each other's nearest in a batch, and near to what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model
from fedllm.models.pairs import MODALITIES


@dataclass(frozen=True)
class Paired(Objective):
    """Both modalities' features of a row are each other's nearest in its batch (InfoNCE), and `kd` times as near as
    they can be to what clients say. Side: `image` and `text` [d], and `known`, 0 before clients have said something."""

    needs: ClassVar[tuple[str, ...]] = ("image", "text", "known")
    temperature: float = knob(0.1, "of the softmax over the batch", gt=0)
    kd: float = knob(0.3, "weight of the squared distance to what clients say", ge=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        net: Any = model.net
        z, good = net.features(batch), batch.labels != IGNORE
        i, t = (model.stack.lanes(z[m]) for m in MODALITIES)  # [K, B, d]
        near = i @ t.mT / self.temperature
        real = good.view(batch.k, -1)
        total = torch.zeros_like(near[:, 0])
        for s in (near, near.mT):
            total = total - s.masked_fill(~real[:, None], -1e9).log_softmax(-1).diagonal(dim1=1, dim2=2)
        far = sum(((z[m] - side[m].to(z[m])).square().mean(-1) for m in MODALITIES), torch.zeros_like(z["image"][:, 0]))
        total = total.flatten() / 2 + self.kd * far * side["known"].to(far)
        return total * good, good.to(total.dtype)

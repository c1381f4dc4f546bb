"""Prototypes: a row is drawn to its class's mean representation and away from the others' (FedPCL, NeurIPS 2022)."""

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
from fedllm.spaces.mlp_head import INNER, mapped


@dataclass(frozen=True)
class Prototypes(Objective):
    """The mean over sets S of -log(exp(z . c_y / tau) / sum_j exp(z . c_j / tau)), and the same for the first set.

    Side: `sets` [S, C, d], each class's prototype in each set, the first being everybody's; and `known` [C], 1 for a
    class that has some. A row of another class counts nothing.
    """

    needs: ClassVar[tuple[str, ...]] = ("sets", "known")
    temperature: float = knob(0.07, "tau", gt=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        z, sets, known = representation(model, batch), side["sets"], side["known"] > 0  # [N, d], [N, S, C, d], [N, C]
        like = (sets.to(z) @ z[:, None, :, None]).squeeze(-1) / self.temperature  # [N, S, C]
        said = like.masked_fill(~known[:, None], float("-inf"))
        y = batch.labels.clamp(min=0)
        fine = (batch.labels != IGNORE) & known.gather(1, y[:, None])[:, 0]
        said = said.masked_fill(~fine[:, None, None], 0.0)
        ce = -said.log_softmax(-1).gather(2, y[:, None, None].expand(-1, said.shape[1], 1))[..., 0]  # [N, S]
        each = ce[:, 0] + (ce[:, 1:].mean(1) if ce.shape[1] > 1 else 0.0)
        return each * fine, fine.to(z.dtype)


def representation(model: Model, batch: Batch) -> Tensor:
    """z = normalized relu(P r) [N, d]; also for `client.measure`."""
    r = model.net.pool(model.hidden(batch), batch.mask)
    return F.normalize(F.relu(mapped(r, INNER, model.stack)), dim=-1)

"""A row's two views are to be told from other rows (SimCLR's NT-Xent, arXiv 2002.05709), by an encoder at rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.local.objectives.two_views import guessed
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Apart(Objective):
    """-log(exp(cos(P(r), t) / tau) / sum over t and the others) (NT-Xent), with others [negatives, d] at rest too."""

    needs: ClassVar[tuple[str, ...]] = ("target", "others")
    temperature: float = knob(0.5, "tau", gt=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        said = guessed(model, batch)
        all_ = torch.cat([side["target"][:, None], side["others"]], 1).to(said)  # [N, 1 + M, d]
        z = (F.normalize(all_, dim=-1) @ said[..., None])[..., 0] / self.temperature
        far = -z.log_softmax(-1)[:, 0]
        return far, torch.ones_like(far)

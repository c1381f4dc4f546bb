"""DPO: the chosen answer gains on the rejected one, measured against a reference (Rafailov et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(beta (log pi(y+|x) / pi(y-|x) - log ref(y+|x) / ref(y-|x))), arXiv 2305.18290.

    A row is the prompt with its chosen answer. Side: `rejected`, the same prompt with the other answer, and `ref`,
    log ref(y+|x) - log ref(y-|x), a number a row. Each counts as one target; log p is summed over an answer's tokens.
    """

    needs: ClassVar[tuple[str, ...]] = ("rejected", "ref")
    beta: float = knob(0.1, "how far the model may leave its reference: the less, the further", gt=0)
    label_smoothing: float = knob(0.0, "share of preferences that are taken to be the wrong way round", ge=0, lt=0.5)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        gain = margin(model, batch, side["rejected"])
        z = self.beta * (gain - side["ref"].to(gain.dtype))
        loss = -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)
        return loss, torch.ones_like(loss)


def margin(model: Model, chosen: Batch, rejected: Batch) -> Tensor:
    """log pi(y+|x) - log pi(y-|x) of each row [N]."""
    return model.row_losses(rejected)[0] - model.row_losses(chosen)[0]


def log_likelihood(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: log pi(y|x) of each row [N, 1], in fp64."""
    return -model.row_losses(batch)[0].double()[:, None]

"""Label words: where an answer begins, the word of the right label against those of the others (prompt learning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.local.objectives.verbalized import scores
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class LabelWords(Objective):
    """-log softmax(z)[y] over `words` alone, with y the word that the row's own answer begins with.

    It needs no side, so that whoever changes a row (an attack) changes its label too. A row whose answer begins with
    none of the words counts nothing.
    """

    words: tuple[int, ...] = knob((), "tokens of the labels, one each")

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        words = torch.tensor(self.words, device=batch.labels.device)
        z = scores(model, batch, words)  # [N, C]
        begins = (batch.labels != -100).int().argmax(1, keepdim=True)  # [N, 1]; 0 where nothing is learned
        hit = (batch.labels.gather(1, begins) == words).to(z)  # [N, C]: a one at the right label
        return -(hit * z.log_softmax(-1)).sum(-1), hit.sum(-1)

"""Texts that were found good become likelier and bad ones less so, near to where the model began (CrossLM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.local.objectives.top_words import divergence
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Rewarded(Objective):
    """r CE a target for r >= 0, |r| max(0, bound - CE) for r < 0, and beta KL(p_0 || p) over p_0's likeliest words.

    Side: `reward` r, a number a row; `words` and `p`, what the model said before, as `top_words` takes it.
    """

    needs: ClassVar[tuple[str, ...]] = ("reward", "words", "p")
    beta: float = knob(0.1, "how strongly it is held to where it began", ge=0)
    bound: float = knob(6.0, "nats a target beyond which a bad text is left alone", gt=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, z, y = model.target_logits(batch)
        n = len(batch.ids)
        count = rows.bincount(minlength=n)
        ce = F.cross_entropy(z, y, reduction="none")
        total = ce.new_zeros(n).index_add(0, rows, ce)
        r = side["reward"].to(ce.dtype)
        out = torch.where(r >= 0, r * total, -r * (self.bound * count - total).clamp(min=0))
        if self.beta:
            out = out + self.beta * ce.new_zeros(n).index_add(0, rows, divergence(z, rows, n, side))
        return out, count.to(ce.dtype)

"""Verbalizers: a label is a word, scored where the answer begins by the language model's own head (PET, EACL 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Verbalized(Objective):
    """-sum_l q_l log p_T(l) over the labels that are words; T = 1, and weight 1, where `soft` is 0, else `soft` T^2.

    Side: `q` [C], how likely each label is, `words` [C], their tokens, and `soft`, 0 for a row whose label is known.
    """

    needs: ClassVar[tuple[str, ...]] = ("q", "soft", "words")
    temperature: float = knob(2.0, "of soft labels and of what is said to them", gt=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        z, soft = scores(model, batch, side["words"].long()), side["soft"]  # [N, C], [N]
        t = torch.where(soft > 0, self.temperature, 1.0).to(z)[:, None]
        each = -(side["q"].to(z) * (z / t).log_softmax(-1)).sum(-1)
        weight = torch.where(soft > 0, soft.to(z) * self.temperature**2, 1.0)
        live = (side["q"].sum(-1) > 0).to(z)  # not what fills up a lane
        return weight * each * live, live


def scores(model: Model, batch: Batch, words: Tensor) -> Tensor:
    """The logits of each row's label words [N, C] where its answer begins; words [N, C] or [C] are token ids."""
    rows, z, _ = model.target_logits(batch)
    first = torch.searchsorted(rows, torch.arange(len(batch.ids), device=rows.device)).clamp(max=len(z) - 1)
    return z[first].gather(1, words.expand(len(batch.ids), -1).to(z.device))


@dataclass(frozen=True)
class Said:
    """For `client.measure`: the logits of these tokens where the answer begins."""

    words: tuple[int, ...]

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        return scores(model, batch, torch.tensor(self.words))

"""Features of teachers: linear maps of a row's pooled state are drawn to what each teacher's own state of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.spaces.mlp_head import mapped


@dataclass(frozen=True)
class Features(Objective):
    """sum_j w_j (mean |W_j r - t_j| + 1 - cos(W_j r, t_j)), r the pooled state; `mse`: the mean square instead.

    Side `target`: the teachers' states one after another [sum of widths]. The maps are trainables `teacher<j>.weight`
    and `.bias`; no label is read (Yang et al., arXiv 2303.10917).
    """

    needs: ClassVar[tuple[str, ...]] = ("target",)
    widths: tuple[int, ...] = knob((), "of each teacher's states")
    weights: tuple[float, ...] = knob((), "of each teacher")
    loss: Literal["l1cos", "mse"] = knob("l1cos", "how far a state is from the teacher's", options=("l1cos", "mse"))

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        r = model.net.pool(model.hidden(batch), batch.mask)
        each, targets = r.new_zeros(len(r)), side["target"].to(r).split(list(self.widths), -1)
        for j, (t, w) in enumerate(zip(targets, self.weights, strict=True)):
            said = mapped(r, f"teacher{j}", model.stack)
            if self.loss == "mse":
                far = (said - t).pow(2).mean(-1)
            else:
                far = (said - t).abs().mean(-1) + 1 - F.cosine_similarity(said, t, dim=-1)
            each = each + w * far
        return each, torch.ones_like(each)


def maps(width: int, widths: Sequence[int], draw: torch.Generator) -> Tree:
    """The teachers' maps at the start."""
    out = Tree()
    for j, w in enumerate(widths):
        out[f"teacher{j}.weight"] = torch.randn(w, width, generator=draw) / width**0.5
        out[f"teacher{j}.bias"] = torch.zeros(w)
    return out


def pooled(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: each row's pooled state [N, d], normed over its width so that no teacher is louder."""
    r = model.net.pool(model.hidden(batch), batch.mask)
    return F.layer_norm(r, r.shape[-1:])


def shares(weights: Sequence[float], teachers: Sequence[str], owner: str) -> tuple[float, ...]:
    """The teachers' weights, which sum to 1; all alike where none are given."""
    if not teachers or len(set(teachers)) != len(teachers):
        raise RecipeError(f"{owner}.teachers = {list(teachers)} is not allowed; it must name one model or more, each "
                          "once")
    given = tuple(weights) or (1.0,) * len(teachers)
    if len(given) != len(teachers) or min(given) < 0 or not sum(given) > 0:
        raise RecipeError(f"{owner}.weights = {list(weights)} is not allowed; it must be a number >= 0 for each of "
                          f"{len(teachers)} teachers, not all 0")
    return tuple(w / sum(given) for w in given)

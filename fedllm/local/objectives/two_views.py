"""Two views of a row are to say the same: the one by the encoder in training, the other by it at rest (BYOL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.spaces.mlp_head import mapped

INNER, OUTER = "predictor.inner", "predictor.outer"


@dataclass(frozen=True)
class TwoViews(Objective):
    """2 - 2 cos(P(r), t), r a row's pooled state and P a predictor of two maps (BYOL, arXiv 2006.07733).

    Side `target` t [d]: what the encoder at rest says of the other view. A row's loss hangs on nothing else.
    """

    needs: ClassVar[tuple[str, ...]] = ("target",)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        far = 2 - 2 * (guessed(model, batch) * F.normalize(side["target"].to(model.net.dtype), dim=-1)).sum(-1)
        return far, torch.ones_like(far)


def guessed(model: Model, batch: Batch) -> Tensor:
    """P(r), normed [N, d]."""
    r = model.net.pool(model.hidden(batch), batch.mask)
    return F.normalize(mapped(F.relu(mapped(r, INNER, model.stack)), OUTER, model.stack), dim=-1)


def states(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: each row's pooled state [N, d]."""
    return model.net.pool(model.hidden(batch), batch.mask)


def predictor(d: int, draw: torch.Generator) -> Tree:
    """P at the start: relu between two maps d -> d."""
    out = Tree()
    for name in (INNER, OUTER):
        out[f"{name}.weight"] = torch.randn(d, d, generator=draw) / d**0.5
        out[f"{name}.bias"] = torch.zeros(d)
    return out


def viewed(row: Any, strike: float, rng: np.random.Generator) -> Any:
    """The row without a share of its tokens, of which one stays."""
    kept = rng.random(len(row.ids)) >= strike
    kept[int(rng.integers(len(kept)))] = True
    return replace(row, ids=row.ids[kept])

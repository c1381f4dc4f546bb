"""GRPO: answers that did better than others of their group become likelier, within a clip and near a reference."""

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
class GRPO(Objective):
    """-1/|y| sum_t min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + beta KL_t (Shao et al., arXiv 2402.03300).

    A row is a prompt with a sampled answer y of |y| tokens. Side: `advantage` A, a number a row; `old` and `ref`, the
    log-probability of each token under the sampling policy and under the reference [|y|]. rho_t = pi / old. KL_t is
    exp(d) - d - 1 with d = log ref - log pi, which is never negative. Each row counts as one target.
    """

    needs: ClassVar[tuple[str, ...]] = ("advantage", "old", "ref")
    clip: float = knob(0.2, "eps: how far a token's ratio counts", gt=0, lt=1)
    beta: float = knob(0.0, "weight of the distance to the reference", ge=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, at, now = token_logs(model, batch)
        a = side["advantage"].to(now)[rows]
        rho = (now - side["old"].to(now)[rows, at]).exp()
        each = -torch.minimum(rho * a, rho.clamp(1 - self.clip, 1 + self.clip) * a)
        if self.beta:
            d = side["ref"].to(now)[rows, at] - now
            each = each + self.beta * (d.exp() - d - 1)
        n = rows.bincount(minlength=len(batch.ids)).to(each.dtype)
        live = (n > 0).to(each.dtype)
        return each.new_zeros(len(n)).index_add(0, rows, each) / n.clamp(min=1), live


def token_logs(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of every target: whose it is [M], which of its row it is [M], and its log-probability [M]."""
    rows, z, y = model.target_logits(batch)
    count = rows.bincount(minlength=len(batch.ids))
    at = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    return rows, at, z.log_softmax(-1).gather(1, y[:, None])[:, 0]


@dataclass(frozen=True)
class TokenLogs:
    """For `client.measure`: the log-probabilities of each row's first targets [N, width], 0 beyond its last."""

    width: int

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        rows, at, logs = token_logs(model, batch)
        out = logs.new_zeros(len(batch.ids), self.width, dtype=torch.float64)
        some = at < self.width
        out[rows[some], at[some]] = logs[some].double()
        return out

"""Environments: a client's row is the place in which it acts; what it learns from are episodes, not rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError
from fedllm.tasks.row import IGNORE, Encoded, Row
from fedllm.tasks.task import How, Losses, Task, wide

NO_ROWS = ("model.name = 'policy' acts in environments and has no loss on rows; use a method that acts (fed_marl), or "
           "a language model")


class Environment(Task):
    """Asked for by `data.source: env:NAME` alone; what a decision transformer learns from are windows of logs
    (`local/logs.py`): the cross-entropy of the actions, and never of a prompt's."""

    net, columns = "policy", ("environment",)

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        raise CompositionError(NO_ROWS)

    def row_losses(self, model: Any, batch: Any) -> Losses:
        if "did" not in batch.parts:
            raise CompositionError(NO_ROWS)
        z = wide(model.net.decide(batch.parts))  # [N, L, actions]
        y = torch.where((batch.labels != IGNORE)[:, None], batch.parts["did"], IGNORE)
        good = y != IGNORE
        total = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORE).view(y.shape)
        return total.sum(1), good.sum(1).to(z.dtype), ((z.argmax(-1) == y) & good).sum(1).to(z.dtype)

"""Environments: a client's row is the place in which it acts; what it learns from are episodes, not rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.tasks.row import Encoded, Row
from fedllm.tasks.task import How, Losses, Task

NO_ROWS = ("model.name = 'policy' acts in environments and has no loss on rows; use a method that acts (fed_marl), or "
           "a language model")


class Environment(Task):
    """Asked for by `data.source: env:NAME` alone."""

    net, columns = "policy", ("environment",)

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        raise CompositionError(NO_ROWS)

    def row_losses(self, model: Any, batch: Any) -> Losses:
        raise CompositionError(NO_ROWS)

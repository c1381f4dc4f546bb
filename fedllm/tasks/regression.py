"""Regression: a text, and a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.tasks.classification import texts_of
from fedllm.tasks.row import IGNORE, Encoded, Row, text_of, value_of
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, wide

TARGET = "target"

LARGEST = 1e18
"""The largest target whose square a single-precision loss can hold."""


class Regression(Task):
    """A number of a text, by an encoder's pooled states; the loss is the squared error."""

    net, columns, outputs = "pooled", ("text", "target"), 1
    metrics: ClassVar = {"rmse": Metric("min", share=False), "mae": Metric("min", share=False)}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        return {"text": text_of(row, "text", where), TARGET: number_of(row, where)}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        return [Encoded(ids, 0, 1, {TARGET: np.array(row[TARGET], np.float64)}, cut=cut)
                for row, (ids, cut) in zip(rows, texts_of(rows, how), strict=True)]

    def row_losses(self, model: Any, batch: Any) -> Losses:
        off, good = _off(model, batch)
        return off.square(), good, torch.zeros_like(off)

    def figures(self, model: Any, batch: Any) -> Tensor:
        """The losses, then the error's size."""
        off, good = (x.double() for x in _off(model, batch))
        return torch.stack([off.square(), good, torch.zeros_like(off), off.abs()], 1)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        square, count, _, size = figures.sum(0)
        return {"rmse": math.sqrt(square / max(1.0, count)), "mae": float(size / max(1.0, count))}


def _off(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """How far each row is off, 0 where it does not count, and whether it counts [N]."""
    said = wide(model.class_logits(batch))[:, 0]
    good = (batch.labels != IGNORE).to(said.dtype)
    return (said - batch.parts[TARGET].to(said.dtype)) * good, good


def number_of(row: Row, where: str) -> float:
    """The row's target; CSV writes numbers as text."""
    value = value_of(row, TARGET, where)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise DataError(f"{where}: {TARGET!r} is {value!r:.80}; it must be a finite number, of 1e18 at most")
    return number

"""Forecasts: what several variables did for a while, and what one of them does after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.tasks.row import IGNORE, Encoded, Row, numbers_of, value_of
from fedllm.tasks.rules import Rule, linear_ar, persistence
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, wide

PAST, FUTURE, SCALE = "past", "future", "scale"


class Forecast(Task):
    """A variable's next steps, from windows of a series (`data.windows`); the loss is the squared error of a step, in
    standard deviations, the metrics are in the variable's own unit."""

    net, columns, bare = "series", (PAST, FUTURE), True
    metrics: ClassVar = {"mae": Metric("min", share=False), "rmse": Metric("min", share=False)}
    rules: ClassVar[Mapping[str, Rule]] = {"persistence": persistence, "linear_ar": linear_ar}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        past, future = numbers_of(row, PAST, where), numbers_of(row, FUTURE, where)
        if past.ndim != 2 or future.ndim != 2 or past.shape[1] != future.shape[1]:
            raise DataError(f"{where}: 'past' has the shape {list(past.shape)} and 'future' {list(future.shape)}; both "
                            "must be lists of steps, each a list of the same variables")
        at = value_of(row, "target", where)
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < past.shape[1]:
            raise DataError(f"{where}: 'target' is {at!r:.80}; it must be a variable's place, 0 to {past.shape[1] - 1}")
        scale = numbers_of(row, SCALE, where) if SCALE in row else np.array([0.0, 1.0], np.float32)
        if scale.shape != (2,) or scale[1] <= 0:
            raise DataError(f"{where}: 'scale' is {scale.tolist()}; it must be [mean, spread], the spread above 0")
        series = {"series": str(row["series"])} if "series" in row else {}
        return {PAST: past.tolist(), FUTURE: future.tolist(), "target": at, SCALE: scale.tolist(), **series}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """A step counts as a token."""
        return [Encoded(np.zeros(len(row[PAST]) + len(row[FUTURE]), np.int32), int(row["target"]), len(row[FUTURE]), {
            PAST: np.array(row[PAST], np.float32), FUTURE: np.array(row[FUTURE], np.float32),
            SCALE: np.array(row[SCALE], np.float64)}) for row in rows]

    def row_losses(self, model: Any, batch: Any) -> Losses:
        off, good = _off(wide(model.net.forecast(batch.parts[PAST])), batch)
        return off.square().sum(1), good * off.shape[1], torch.zeros_like(good)

    def figures(self, model: Any, batch: Any) -> Tensor:
        return figured(wide(model.net.forecast(batch.parts[PAST])), batch)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        _, count, _, size, square = figures.sum(0)
        return {"mae": float(size / max(1.0, count)), "rmse": math.sqrt(square / max(1.0, count))}

    def by_rule(self, name: str, train: Sequence[Encoded], test: Sequence[Encoded], labels: tuple[str, ...]
                ) -> dict[str, float]:
        said = self.rules[name](train, test)  # [N, H], standardized
        off = np.stack([s - e.parts[FUTURE][:, int(e.labels)] for s, e in zip(said, test, strict=True)])
        own = off * np.array([e.parts[SCALE][1] for e in test])[:, None]
        return {"loss": float((off**2).mean()), "n": len(test), "mae": float(np.abs(own).mean()),
                "rmse": float(np.sqrt((own**2).mean()))}


def figured(said: Tensor, batch: Any) -> Tensor:
    """For each row of forecasts [N, H]: the losses, then the error's size and square in the variable's unit."""
    off, good = (x.double() for x in _off(said, batch))
    own = off * batch.parts[SCALE][:, 1:]
    return torch.stack([off.square().sum(1), good * off.shape[1], torch.zeros_like(good), own.abs().sum(1),
                        own.square().sum(1)], 1)


def _off(said: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """How far each step of each row is off [N, H], 0 where the row does not count, and whether it counts [N]."""
    good = (batch.labels != IGNORE).to(said.dtype)
    at = batch.labels.clamp(min=0)
    truth = batch.parts[FUTURE].to(said.dtype).gather(2, at[:, None, None].expand(-1, said.shape[1], 1))[..., 0]
    return (said - truth) * good[:, None], good

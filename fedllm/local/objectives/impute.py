"""Filling in: the squared error of readings that were masked, in runs of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class Impute(Objective):
    """Side `mask` [L + H, V] of each window: 1 where the network sees a zero, and is asked what stood there."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        net: Any = model.net
        x = torch.cat([batch.parts["past"], batch.parts["future"]], 1).to(net.dtype)
        mask = side["mask"].to(net.dtype) * (batch.labels != IGNORE)[:, None, None]
        off = (net.fill(x * (1 - mask)) - x) * mask
        return off.square().flatten(1).sum(1), mask.flatten(1).sum(1)


def spans(rng: np.random.Generator, rows: int, steps: int, variables: int, ratio: float, length: float) -> np.ndarray:
    """[rows, steps, variables] fp32 of 0 and 1: runs of ones are geometric of mean `length`, those of zeros so that
    `ratio` of all are ones (Zerveas et al. 2021)."""
    leave = 1 / length
    enter = leave * ratio / (1 - ratio)
    on, out = rng.random((rows, variables)) < ratio, np.zeros((rows, steps, variables), np.float32)
    for t in range(steps):
        out[:, t] = on
        draw = rng.random((rows, variables))
        on = np.where(on, draw >= leave, draw < enter)
    return out

"""How a client trains between two messages: optimizer, steps, batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.method import Knobs, knob


@dataclass(frozen=True)
class LocalSpec(Knobs):
    """One client's work in a round. Optimizer state starts afresh each round (dossier rule 0.2)."""

    optimizer: Literal["adamw", "adam", "sgd"] = knob("adamw", "local optimizer", options=("adamw", "adam", "sgd"))
    lr: float = knob(3e-3, "learning rate", gt=0)
    steps: int | None = knob(None, "steps per round; None: as many as `epochs` needs", ge=1)
    epochs: int = knob(1, "passes over the client's rows per round, where `steps` is not given", ge=1)
    batch_size: int = knob(8, "rows per step", ge=1)
    momentum: float = knob(0.0, "momentum of SGD", ge=0, lt=1)
    weight_decay: float = knob(0.0, "decoupled for adamw, added to the gradient otherwise", ge=0)
    beta1: float = knob(0.9, "Adam's first decay", ge=0, lt=1)
    beta2: float = knob(0.999, "Adam's second decay", ge=0, lt=1)
    clip_norm: float | None = knob(None, "clip each client's gradient to this L2 norm; None: never", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = knob("constant", "learning rate within the round",
                                                             options=("constant", "linear", "cosine"))
    over_rounds: Literal["constant", "linear", "cosine"] = knob(
        "constant", "learning rate from round to round; linear and cosine fall towards 0 as the run ends",
        options=("constant", "linear", "cosine"))
    max_length: int = knob(512, "tokens kept of a row", ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum and self.optimizer != "sgd":
            raise RecipeError(f"local.momentum = {self.momentum} is SGD's knob; {self.optimizer} has beta1")

    def count(self, rows: int) -> int:
        """How many steps a round has for a client with so many rows."""
        return self.steps or self.epochs * -(-rows // self.batch_size)

    def optimizer_over(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """A torch optimizer over stacked tensors: elementwise, so that each lane is on its own."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
                                   foreach=True)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(params, self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of this step of the round."""
        return self.lr * _share(self.schedule, step / max(1, steps))

    def at(self, round: int, rounds: int | None) -> LocalSpec:
        """The same work in this round (from 0) of so many; None: the run has no set end, and the rate stays."""
        if self.over_rounds == "constant" or not rounds:
            return self
        return replace(self, lr=self.lr * _share(self.over_rounds, min(round, rounds - 1) / rounds))


def _share(schedule: str, done: float) -> float:
    """Of the peak rate, when this part (0 to 1) of the way is done."""
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

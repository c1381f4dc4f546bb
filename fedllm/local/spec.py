"""How a client trains between two messages: optimizer, steps, batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import Knobs, knob


@dataclass(frozen=True)
class LocalSpec(Knobs):
    """One client's work in a round. Optimizer state starts afresh each round unless a method gives it to `fit`."""

    optimizer: Literal["adamw", "adam", "sgd"] = knob("adamw", "local optimizer", options=("adamw", "adam", "sgd"))
    lr: float = knob(3e-3, "learning rate", gt=0)
    steps: int | None = knob(None, "steps per round; None: as many as `epochs` needs", ge=1)
    epochs: int = knob(1, "passes over the client's rows per round, where `steps` is not given", ge=1)
    batch_size: int = knob(8, "rows per step, or of each part of a step where `accumulate` is above 1", ge=1)
    accumulate: int = knob(1, "parts of a step, each a forward and backward of `batch_size` rows: one step of "
                              "batch_size * accumulate rows in the memory of batch_size", ge=1)
    momentum: float = knob(0.0, "momentum of SGD", ge=0, lt=1)
    weight_decay: float = knob(0.0, "decoupled for adamw, added to the gradient otherwise", ge=0)
    beta1: float = knob(0.9, "Adam's first decay", ge=0, lt=1)
    beta2: float = knob(0.999, "Adam's second decay", ge=0, lt=1)
    order: Literal["shuffled", "stream"] = knob(
        "shuffled", "how rows are dealt into batches: shuffled, anew in each round, short rows with short; stream, "
                    "each round going on where the last that counted ended, so that an epoch has each row exactly once",
        options=("shuffled", "stream"))
    clip_norm: float | None = knob(None, "clip each client's gradient to this L2 norm; None: never", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = knob("constant", "learning rate within the round",
                                                             options=("constant", "linear", "cosine"))
    over_rounds: Literal["constant", "linear", "cosine", "linear_steps", "cosine_steps"] = knob(
        "constant", "learning rate over the run: linear and cosine fall from round to round, towards 0 as it ends; "
                    "linear_steps and cosine_steps from local step to local step, counted over all rounds",
        options=("constant", "linear", "cosine", "linear_steps", "cosine_steps"))
    warmup: int = knob(0, "local steps, counted over all rounds, in which the rate climbs to `lr`", ge=0)
    max_length: int = knob(512, "tokens kept of a row", ge=2)
    every_turn: bool = knob(True, "learn every assistant turn of a conversation; false: the last alone")
    checkpointing: bool = knob(False, "keep each layer's input alone and compute the layer again in the backward pass: "
                                      "the same gradients, less memory, about a third more time")
    packing: bool = knob(False, "lay a step's short rows end to end, each seeing itself alone: the same training with "
                                "less padding")
    lora_plus: float | None = knob(None, "LoRA+: the rate of LoRA's B factors is this many times `lr`; None: the same",
                                   gt=0, le=1024)
    neftune: float | None = knob(None, "NEFTune: uniform noise of alpha / sqrt(tokens * width) on the word embeddings "
                                       "while training; None: none", gt=0, le=1e4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum and self.optimizer != "sgd":
            raise RecipeError(f"local.momentum = {self.momentum} is SGD's knob; {self.optimizer} has beta1")
        if self.packing and self.neftune is not None:
            raise RecipeError(f"local.neftune = {self.neftune} goes by the length of each row, and local.packing lays "
                              "rows end to end; leave one out")

    @property
    def lot(self) -> int:
        """Rows of a whole step."""
        return self.batch_size * self.accumulate

    def count(self, rows: int) -> int:
        """How many steps a round has for a client with so many rows."""
        return self.steps or self.epochs * -(-rows // self.lot)

    def optimizer_over(self, params: Sequence[Tensor], names: Sequence[str] = ()) -> torch.optim.Optimizer:
        """A torch optimizer over stacked tensors: elementwise, so that each lane is on its own.

        By their `names` LoRA+ tells the B factors, whose group has the key `times`.
        """
        groups: Any = list(params)
        if self.lora_plus is not None and names:
            fast = [".lora_B." in n for n in names]
            groups = [{"params": [p for p, b in zip(params, fast, strict=True) if b is which], "times": times}
                      for which, times in ((False, 1.0), (True, self.lora_plus))]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
                                   foreach=True)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of this step of the round."""
        return self.lr * _share(self.schedule, step / max(1, steps))

    def at(self, round: int, rounds: int | None, n: int = 1, done: int = 0) -> LocalSpec:
        """The same work in this round (from 0) of so many, for a client of `n` rows that has taken `done` steps in it.

        None: the run has no set end, and a rate that falls from round to round stays. RecipeError for a warm-up, or a
        fall from step to step, that has no end.
        """
        kind, _, by_steps = self.over_rounds.partition("_")
        spec = self
        if rounds and not by_steps and kind != "constant":
            spec = replace(self, lr=self.lr * _share(kind, min(round, rounds - 1) / rounds))
        if not by_steps and not self.warmup:
            return spec
        if not rounds:
            key = f"over_rounds = {self.over_rounds!r}" if by_steps else f"warmup = {self.warmup}"
            raise RecipeError(f"local.{key} counts the steps of a whole run, and this one has no set end; give rounds, "
                              "or leave it out")
        each = max(1, self.count(n))
        if self.warmup >= rounds * each:
            raise RecipeError(f"local.warmup = {self.warmup} is not allowed; it must be below the {rounds * each} "
                              f"steps of a client with {n} rows ({rounds} rounds of {each})")
        values = {f.name: getattr(spec, f.name) for f in fields(LocalSpec)}
        return InRun(**values, begun=round * each + done, total=rounds * each)


@dataclass(frozen=True)
class InRun(LocalSpec):
    """A client's work whose rate hangs on how many local steps of the whole run lie behind it."""

    begun: int = 0
    """Steps before this fit, as if the client had taken part in every round."""
    total: int = 1
    """Steps of the whole run."""

    def rate(self, step: int, steps: int) -> float:
        at, lr = min(self.begun + step, self.total - 1), super().rate(step, steps)
        if at < self.warmup:
            return lr * (at + 1) / self.warmup
        kind, _, by_steps = self.over_rounds.partition("_")
        return lr * _share(kind, (at - self.warmup) / (self.total - self.warmup)) if by_steps else lr


def _share(schedule: str, done: float) -> float:
    """Of the peak rate, when this part (0 to 1) of the way is done."""
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

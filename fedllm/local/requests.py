"""What client code asks for: each request type knows how many of its kind run together.

An engine gathers requests, groups them by `group`, and calls `run` on each group; one at a time is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.private import Private
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Term
from fedllm.models.model import Model


def always() -> None:
    """Work goes on."""


@dataclass(frozen=True)
class Limits:
    """How much one step may hold at once."""

    batch_tokens: int = 16384
    lane_bytes: int = 1 << 30
    """Stacked trainables, with gradients and optimizer state."""
    go_on: Callable[[], None] = always
    """Called before each training step; raises when the work is of no use any longer."""


@dataclass(frozen=True)
class Request:
    """Work for the model on behalf of one client."""

    client: str
    model: Model
    theta: Tree
    base: Tree | None

    @property
    def group(self) -> Hashable:
        """Requests with equal groups can share a forward."""
        ragged = self.model.space.ragged
        shapes = tuple((n, t.dtype, t.dim() if ragged else t.shape) for n, t in self.theta.items())
        lane = None if self.model.stackable else id(self)
        return (type(self), id(self.model), same(self.base), shapes, lane)


@dataclass(frozen=True)
class Fit(Request):
    """Train `theta` on `rows`, batch after batch of `plan`."""

    rows: Sequence[Encoded]
    plan: Sequence[np.ndarray]
    spec: LocalSpec
    freeze: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    private: Private | None = None
    """Clip each example's gradient and add noise; batches may then be empty."""

    @property
    def group(self) -> Hashable:
        steps = len(self.plan) if self.spec.schedule != "constant" else None
        private = self.private and self.private.key
        return (*super().group, self.spec, self.freeze, tuple(t.key for t in self.terms), steps, private)


@dataclass(frozen=True)
class Losses(Request):
    """Loss of `theta` on each row, without a gradient."""

    rows: Sequence[Encoded]


@dataclass(frozen=True)
class Probe(Losses):
    """Losses of several trainables on the same rows: `thetas`, of which `theta` is the first."""

    thetas: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class Sensitivity(Request):
    """The mean over the rows of |d loss(row) / d w|, for every trainable w."""

    rows: Sequence[Encoded]


@dataclass(frozen=True)
class Generate(Request):
    """Continue each prompt (token ids)."""

    prompts: Sequence[np.ndarray]
    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0

    @property
    def group(self) -> Hashable:
        return (*super().group, self.max_new_tokens, self.temperature)


@dataclass(frozen=True)
class Embed(Request):
    """Mean-pooled last hidden states of each row."""

    rows: Sequence[Encoded]


@dataclass(frozen=True)
class Outputs(Request):
    """Class logits of texts that are given as embeddings, each [T, d]."""

    rows: Sequence[Tensor]


def tokens_of(request: Request) -> int:
    """Tokens of work that is no training; a generation is counted as if it used all that it may."""
    if isinstance(request, Fit):
        return 0
    if isinstance(request, Generate):
        return sum(len(p) + request.max_new_tokens for p in request.prompts)
    rows = getattr(request, "rows", ())
    passes = len(request.thetas) if isinstance(request, Probe) else 1
    return passes * sum(len(r.ids) if isinstance(r, Encoded) else len(r) for r in rows)


@dataclass(frozen=True)
class Fitted:
    """What training gave: the trainables, the mean training loss, and how much work it was."""

    theta: Tree
    loss: float
    steps: int
    examples: int
    tokens: int
    lr_sum: float
    """Sum of the learning rates used, step by step (SCAFFOLD divides by it)."""


@dataclass(frozen=True)
class RowLosses:
    """Per row: summed loss, number of targets, number predicted right (classification)."""

    total: np.ndarray
    count: np.ndarray
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def mean(self) -> float:
        """Mean loss per target over all rows."""
        return float(self.total.sum() / max(1.0, self.count.sum()))


def same(tree: Mapping[str, Tensor] | None) -> tuple[int, ...]:
    """Equal for trees of the very same tensors, whatever mapping holds them."""
    return tuple(id(t) for t in tree.values()) if tree else ()

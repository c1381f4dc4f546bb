"""What client code asks for: each request type knows how many of its kind run together.

An engine gathers requests, groups them by `group`, and calls `run` on each group; one at a time is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fedllm.core.payload import Kept, Tree
from fedllm.data.encode import Encoded
from fedllm.local.objective import Objective, Side
from fedllm.local.objectives.task import Task
from fedllm.local.private import Private
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Term
from fedllm.models.model import Model
from fedllm.models.sealed import opened
from fedllm.models.size import cached_tokens, read_tokens, step_tokens


def always() -> None:
    """Work goes on."""


def unseen(steps: int, tokens: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Limits:
    """How much one step may hold at once."""

    batch_tokens: int | None = None
    """Tokens over all clients; None: what the model's own sizes and the machine allow (`models/size.py`)."""
    lane_bytes: int = 1 << 30
    """Stacked trainables, with gradients and optimizer state."""
    go_on: Callable[[], None] = always
    """Called before each training step; raises when the work is of no use any longer."""
    did: Callable[[int, int], None] = unseen
    """Told after each training step how many clients made it, and on how many tokens together."""
    group: Any = None
    """The processes that train a client together (`local/group.py`); None: this one alone."""

    def learned(self, model: Any) -> int:
        """Tokens of a training step."""
        return self.batch_tokens or step_tokens(opened(model))

    def read(self, model: Any) -> int:
        """Tokens of a pass without gradients."""
        return self.batch_tokens or read_tokens(opened(model))

    def kept(self, model: Any) -> int:
        """Tokens of texts that are continued together, read and said."""
        return self.batch_tokens or min(read_tokens(opened(model)), cached_tokens(opened(model)))


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
        return (type(self), id(self.model), same(self.base), shapes, lane, self.form)

    @property
    def form(self) -> Hashable:
        """What its rows hold beside text: rows whose parts differ in shape cannot lie in one batch."""
        return ()

    @property
    def reads(self) -> int:
        """Tokens of work that is no training (training is told beforehand, `engines.client.Bounds`); what is said is
        counted as if it were as long as it may be."""
        return 0


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
    objective: Objective = field(default_factory=Task)
    side: Side = field(default_factory=dict)
    """What the objective needs beside each of `rows`."""
    moments: Tree | Literal[False] | None = False
    """The optimizer's state to go on from (`Fitted.moments`); None: it starts afresh and is told; False: and is not."""
    noise: int | None = None
    """Seed of what is drawn while it trains (dropout, NEFTune); None: nothing is."""

    @property
    def form(self) -> Hashable:
        return form_of(self.rows)

    @property
    def group(self) -> Hashable:
        steps = len(self.plan) if self.spec.schedule != "constant" else None
        private = self.private and self.private.key
        done = int(self.moments["step"]) if self.moments else 0  # Adam corrects its bias by it, alike for all lanes
        return (*super().group, self.spec, self.freeze, tuple(t.key for t in self.terms), steps, private,
                self.objective.key, done)

    @property
    def alongside(self) -> list[Sequence[Encoded]]:
        """The tokenized rows that pass through the model beside the rows themselves."""
        return [v for v in self.side.values() if len(v) and isinstance(v[0], Encoded)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, with those of what goes beside it."""
        every = (self.rows, *self.alongside)
        return np.array([sum(len(v[i].ids) for v in every) for i in range(len(self.rows))], int)


@dataclass(frozen=True)
class Losses(Request):
    """Loss of `theta` on each row, without a gradient; `tested` asks for the task's own figures too."""

    rows: Sequence[Encoded]
    tested: bool = field(default=False, kw_only=True)

    @property
    def form(self) -> Hashable:
        return (self.tested, form_of(self.rows))

    @property
    def reads(self) -> int:
        return sum(len(r.ids) for r in self.rows)


@dataclass(frozen=True)
class Logits(Losses):
    """What the task's head says of each row: [classes], or [T, classes] where every token has a class."""


@dataclass(frozen=True)
class Measure(Losses):
    """`fn(model, batch)`, a vector for each row, without a gradient."""

    fn: Callable[..., Tensor] = None  # type: ignore[assignment]

    @property
    def group(self) -> Hashable:
        return (*super().group, self.fn)


@dataclass(frozen=True)
class Probe(Losses):
    """Losses of several trainables on the same rows: `thetas`, of which `theta` is the first."""

    thetas: tuple[Tree, ...] = ()

    @property
    def reads(self) -> int:
        return len(self.thetas) * super().reads


@dataclass(frozen=True)
class Sensitivity(Request):
    """The mean over the rows of |d loss(row) / d w|, for every trainable w; `signed`: of the gradients themselves."""

    rows: Sequence[Encoded]
    signed: bool = False

    @property
    def form(self) -> Hashable:
        return form_of(self.rows)

    @property
    def reads(self) -> int:
        return sum(len(r.ids) for r in self.rows)


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

    @property
    def reads(self) -> int:
        return sum(len(p) + self.max_new_tokens for p in self.prompts)


@dataclass(frozen=True)
class Complete(Request):
    """Continue each prompt as text and say how likely the answer is; `model` may be an endpoint."""

    prompts: Sequence[str]
    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0

    @property
    def group(self) -> Hashable:
        return type(self), id(self.model)

    @property
    def reads(self) -> int:
        """No token has less than a character, or a byte, of the prompt."""
        return sum(len(p.encode()) + self.max_new_tokens for p in self.prompts)


@dataclass(frozen=True)
class Embed(Request):
    """Mean-pooled last hidden states of each row."""

    rows: Sequence[Encoded]

    @property
    def reads(self) -> int:
        return sum(len(r.ids) for r in self.rows)


@dataclass(frozen=True)
class Outputs(Request):
    """Class logits of texts that are given as embeddings, each [T, d]."""

    rows: Sequence[Tensor]

    @property
    def reads(self) -> int:
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Booked(Request):
    """Work that a client function does by itself: nothing is run, and it is counted like any other."""

    tokens: int = 0
    steps: float = 0.0
    flops: float = 0.0


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
    moments: Kept = field(default_factory=Kept)
    """The optimizer's state at the end, where the fit was given one or None (`local/moments.py`)."""


@dataclass(frozen=True)
class RowLosses:
    """Per row: summed loss, number of targets, number predicted right."""

    total: np.ndarray
    count: np.ndarray
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0))
    figures: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    """Of a test: what the task's metrics sum up [rows, 3 or more]."""

    @property
    def mean(self) -> float:
        """Mean loss per target over all rows."""
        return float(self.total.sum() / max(1.0, self.count.sum()))


def form_of(rows: Sequence[Encoded]) -> Hashable:
    """The form of one client's rows (`Encoded.form`), which is the same for all of them."""
    return rows[0].form if rows else None


def same(tree: Mapping[str, Tensor] | None) -> tuple[int, ...]:
    """Equal for trees of the very same tensors, whatever mapping holds them."""
    return tuple(id(t) for t in tree.values()) if tree else ()

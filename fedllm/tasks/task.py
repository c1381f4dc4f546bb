"""What a task is: the columns of its rows, their tensors, the loss on them, and the figures by which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.tasks.row import Encoded, Row
from fedllm.tasks.rules import Rule


@dataclass(frozen=True)
class Metric:
    """Which way a figure is better, and whether it is a share (from 0 to 1)."""

    best: Literal["max", "min"]
    share: bool = True


@dataclass(frozen=True)
class Shape:
    """What a user's row is made into a row of the task by."""

    template: Callable[[Row, str], dict[str, Any]]
    labels: tuple[str, ...] = ()
    folder: Path | None = None
    """Where relative paths in rows begin: the folder of the file that holds them."""


@dataclass(frozen=True)
class How:
    """What rows are made into tensors by."""

    tokenizer: Any
    max_length: int = 512
    completion_only: bool = True
    """Learn the response's tokens alone, where the task has a prompt."""
    images: Any = None
    """An image processor of transformers, where the model has one."""
    every_turn: bool = True
    """Learn every assistant turn of a conversation; False: the last."""
    whole: int | None = None
    """To test: the prompt is kept whole, up to so many tokens of the row. None: `max_length` holds for all of it."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise RecipeError(f"max_length = {self.max_length}: allowed is a whole number from 2 up")

    def tokens(self, texts: Sequence[Any], **options: Any) -> Any:
        """The tokenizer's answer, without what nobody reads."""
        return self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


class Rows(Protocol):
    """A batch, as tasks see it (`fedllm.models.batch.Batch`)."""

    k: int
    ids: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    labels: Tensor  # [N, T] or [N]
    parts: Mapping[str, Tensor]


class Net(Protocol):
    """A model, as tasks see it (`fedllm.models.model.Model`)."""

    net: Any
    labels: tuple[str, ...]

    def hidden(self, batch: Any) -> Tensor:
        """[N, T, d]."""

    def class_logits(self, batch: Any) -> Tensor:
        """[N, classes], or [N, T, classes] where every token is classified."""

    def word_losses(self, h: Tensor, rows: Tensor, cols: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy [M] of the words `y` [M] through the head at h[rows, cols]."""

    def word_logits(self, batch: Any) -> Tensor:
        """[N, T, V] of a network with a vocabulary head that sees both sides."""


Losses = tuple[Tensor, Tensor, Tensor]
"""For each row [N]: summed loss, how many targets it sums over, how many of them were predicted right."""


class Task:
    """One kind of row. Stateless; found by its file's stem."""

    net: ClassVar[Literal["causal", "pooled", "tokens", "masked", "dual", "policy", "series", "pairs"]]
    """What network is loaded: a causal LM, an encoder with a head over its pooled states or over each of them, a
    masked LM, an image-text encoder; or built: a policy that acts, a forecaster of series, a network of two
    modalities."""
    columns: ClassVar[tuple[str, ...]]
    """Fields that a row of the task has."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Which of data.template and data.labels are of use to it."""
    outputs: ClassVar[int | None] = None
    """How wide the head is; None: as many as there are labels."""
    bare: ClassVar[bool] = False
    """Whether its rows are read also where a model has no tokenizer."""
    speaks: ClassVar[bool] = False
    """Whether answers can be generated and compared with the row's `response`."""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """Its own figures, the most telling first; every task has `loss` beside."""

    rules: ClassVar[Mapping[str, Rule]] = {}
    """Rules without a model that its field holds models against, by name."""

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """The row in the task's columns; a DataError names the place, the field and what is allowed."""
        raise NotImplementedError

    def came(self, row: Row, labels: tuple[str, ...]) -> bool:
        """Whether a row that came from another machine is one as `shape` makes it, and names no file of this one."""
        return "messages" in row or (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str))

    def found(self, rows: Iterable[tuple[Row, str]]) -> tuple[str, ...]:
        """Label names of rows (and where they are), where neither the recipe nor the data set says them."""
        return ()

    def agree(self, rows: Iterable[tuple[Row, str]], labels: tuple[str, ...]) -> None:
        """A DataError where rows, each of which is allowed, do not go together."""

    def kind(self, row: Row, labels: tuple[str, ...]) -> Any:
        """What a client's rows are counted by."""
        return row.get("category")

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """All rows as tensors; a DataError names a row (from 1) in which nothing is left to learn."""
        raise NotImplementedError

    def row_losses(self, model: Any, batch: Any) -> Losses:
        """Summed loss, count and hits of each row, with a gradient."""
        raise NotImplementedError

    def figures(self, model: Any, batch: Any) -> Tensor:
        """What `measured` sums up, a row each [N, 3 or more], fp64: the losses, then figures of the task's own."""
        return torch.stack([x.double() for x in self.row_losses(model, batch)], 1)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        """The task's metrics on these rows."""
        return {}


    def by_rule(self, name: str, train: Sequence[Encoded], test: Sequence[Encoded], labels: tuple[str, ...]
                ) -> dict[str, float]:
        """What the rule `name`, learned from some rows, comes to on others, under the names of loss and metrics."""
        raise NotImplementedError


def hits(figures: np.ndarray) -> float:
    """The share of targets predicted right."""
    return float(figures[:, 2].sum() / max(1.0, figures[:, 1].sum()))


def wide(x: Tensor) -> Tensor:
    """In fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

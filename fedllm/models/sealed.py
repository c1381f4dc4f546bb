"""A model that answers and nothing else: its weights cannot be reached through it, and no gradient goes through it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.models.batch import Batch
from fedllm.models.model import Model

OPEN = ("tokenizer", "task", "space", "labels", "seed", "name", "stackable", "pad", "device", "fast_kernels", "words",
        "withheld", "rules", "measured", "read", "images", "positions", "room", "ends")
"""What may be known of it: its token embeddings too (`words`, a copy), or no prompt could be made of tokens."""
INSIDE: weakref.WeakKeyDictionary[Sealed, Model] = weakref.WeakKeyDictionary()
MADE: weakref.WeakKeyDictionary[Model, Sealed] = weakref.WeakKeyDictionary()


class Sealed:
    """Scores rows under prompts or other trainables of its space; anything else is a ModelError."""

    def __init__(self, model: Model) -> None:
        known = {name: getattr(model, name) for name in OPEN if name != "words"}

        def ask(name: str, *args: Any) -> Any:
            with torch.inference_mode():
                return getattr(model, name)(*args)

        INSIDE[self] = model
        self.__dict__.update(_known=known, _ask=ask, _using=model.using, start=model.initial())

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_known"]:
            return self.__dict__["_known"][name]
        raise ModelError(f"this model is a black box: '{name}' cannot be reached; it scores rows and knows "
                         f"{', '.join(OPEN)}")

    @functools.cached_property
    def words(self) -> Tensor:
        """The token embeddings [V, d]; a copy, so that nobody writes into the model."""
        return INSIDE[self].words.clone()

    def initial(self) -> Tree:
        """The trainables that it starts from (for a prompt space: its first prompt)."""
        return dict(self.__dict__["start"])

    @contextlib.contextmanager
    def using(self, trees: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None,
              stacked: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Answer with these lanes' trainables; nothing may be merged into its weights."""
        if base:
            raise ModelError("this model is a black box: nothing can be added to its weights")
        with torch.inference_mode(), self.__dict__["_using"](trees, None, stacked):
            yield

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For each row: summed loss, how many targets, how many right."""
        return self.__dict__["_ask"]("row_losses", batch)

    def figures(self, batch: Batch) -> Tensor:
        """What the task's metrics are made of, a row each."""
        return self.__dict__["_ask"]("figures", batch)

    def outputs(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Class logits of texts that are given as embeddings."""
        return self.__dict__["_ask"]("outputs", embeds, mask).clone()


def sealed(model: Any) -> Any:
    """The black box of a model, one for each; what is no model of ours (an endpoint) is one already."""
    if not isinstance(model, Model):
        return model
    if model not in MADE:
        MADE[model] = Sealed(model)
    return MADE[model]


def opened(model: Any) -> Any:
    """For the engine's own runners (text in, text out): the model behind a black box, or the model as it is."""
    return INSIDE[model] if isinstance(model, Sealed) else model

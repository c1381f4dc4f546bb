"""The names of classes as a text tower reads them: in a sentence of its own, or bare for one that is learned."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import ModelError

PROMPT = "a photo of a {}"
AMONG = "among"
"""The part of a row that says which classes it is told among [C], where that is not all of them."""


@dataclass(frozen=True)
class Names:
    """Token ids of each class's name and of the full stop after it, and what the tokenizer puts around every text."""

    lead: tuple[int, ...]
    names: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]
    stop: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    """The words of the model's own sentence that stand before the name: `a photo of a`."""
    pad: int = 0
    whole: int | None = None
    """Every text is filled up to so many tokens (SigLIP, which was trained so)."""

    def __deepcopy__(self, memo: Any) -> Names:
        return self

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a few of them in a process)
    def sentences(self, context: int, place: str, room: int, labels: tuple[str, ...] = ()
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and `at` [C, T], which says of each token the how-manyeth of the learned ones it is (-1: none).

        ModelError where a sentence is longer than `room`. The ids of learned tokens are the first of every text, which
        no tower takes for the end. Without any the full stop is left out: bare names.
        """
        rows, places = [], []
        first = {"end": context, "middle": context // 2, "front": 0}[place]
        for name in self.names:
            own, stop = [-1] * len(name), self.stop if context else ()
            at = [*range(first), *own, *range(first, context)]
            ids = iter(name)
            some = [next(ids) if i < 0 else (self.lead or (self.pad,))[0] for i in at]
            rows.append([*self.lead, *some, *stop, *self.tail])
            places.append([-1] * len(self.lead) + at + [-1] * (len(stop) + len(self.tail)))
        self._fits(rows, context, room, labels)
        width = self.whole or max(map(len, rows))
        fill = lambda row, by: row + [by] * (width - len(row))  # noqa: E731
        mask = [[1] * (width if self.whole else len(row)) for row in rows]
        return (torch.tensor([fill(r, self.pad) for r in rows]), torch.tensor([fill(m, 0) for m in mask]),
                torch.tensor([fill(a, -1) for a in places]))

    def _fits(self, rows: Sequence[Sequence[int]], context: int, room: int, labels: Sequence[str]) -> None:
        longest = max(range(len(rows)), key=lambda c: len(rows[c]))
        if (over := len(rows[longest]) - (self.whole or room)) > 0:
            name = labels[longest] if labels else f"class {longest}"
            allowed = context - over
            raise ModelError(f"space.length = {context}: with the name {name!r:.80} the prompt has "
                             f"{len(rows[longest])} tokens, and the text tower reads {self.whole or room}; " + (
                                 f"allowed are 1 to {allowed}" if allowed > 0 else "a shorter name works"))


def whole_of(clip: Any) -> int | None:
    """The length to which every text of this model is filled; None: as long as it is."""
    config = clip.config
    return int(config.text_config.max_position_embeddings) if config.model_type.startswith("siglip") else None


def class_prompts(tokenizer: Any, labels: Sequence[str], clip: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask [C, T] of `a photo of a <label>`; ModelError for a name that the tower has no room for."""
    if not labels:
        raise ModelError("an image-text model needs the data's labels: their names are what pictures are matched with")
    texts, full = [PROMPT.format(name) for name in labels], whole_of(clip)
    room = int(clip.config.text_config.max_position_embeddings)
    for name, ids in zip(labels, tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > room:
            raise ModelError(f"the class name {name!r:.80} is too long for the text tower: {PROMPT.format('...')!r} "
                             f"with it has {len(ids)} tokens, and allowed are {room}")
    got = tokenizer(texts, padding="max_length" if full else True, return_tensors="pt",
                    **({"max_length": full} if full else {}))
    return got["input_ids"], torch.ones_like(got["input_ids"]) if full else got["attention_mask"]


def names_of(tokenizer: Any, labels: Sequence[str], clip: Any) -> Names:
    """The classes' bare names as tokens; ModelError for one that gives none."""
    bare = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    got = tokenizer(PROMPT.format("a"), return_special_tokens_mask=True)
    special = got["special_tokens_mask"]
    inner = [i for i, s in enumerate(special) if not s]
    names = [tuple(bare(name)) for name in labels]
    for label, ids in zip(labels, names, strict=True):
        if not ids:
            raise ModelError(f"the class name {label!r:.80} gives the text tower's tokenizer no token")
    return Names(tuple(got["input_ids"][: inner[0]]), tuple(names), tuple(got["input_ids"][inner[-1] + 1 :]),
                 tuple(bare(".")), tuple(bare(PROMPT.format("").strip())), tokenizer.pad_token_id or 0, whole_of(clip))

"""Labels that are words: which tokens they are, which one a row has, and how often the likeliest is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.layer import name_of
from fedllm.core.method import Method
from fedllm.core.payload import Tree
from fedllm.local.objectives.verbalized import Said


def check_words(method: Method, verbalizer: Sequence[str], model: Any) -> None:
    """CompositionError where labels cannot be words of this model's, or are too few."""
    stem = name_of(method)
    if model.task != "generation":
        raise CompositionError(f"method '{stem}' and data.task = {model.task!r} do not fit together: a label is a word "
                               "that the model says; use data.task = 'generation'")
    if len(set(verbalizer)) < max(2, len(verbalizer)):
        raise CompositionError(f"method.verbalizer = {list(verbalizer)} is not allowed; it needs two words or more, "
                               "each another")


def words_of(client: Client, verbalizer: Sequence[str]) -> tuple[int, ...]:
    """The token of each label, as it stands after a prompt; DataError for a word that is not one token."""
    made = client.encode([{"prompt": "it was", "response": w} for w in verbalizer])
    ends, found = client.model.ends, []
    for word, row in zip(verbalizer, made, strict=True):
        said = [int(t) for t in row.labels if t >= 0 and int(t) not in ends]
        if len(said) != 1:
            raise DataError(f"method.verbalizer: {word!r} is {len(said)} tokens of this model's, and a label's "
                            "word must be one; choose another")
        found.append(said[0])
    return tuple(found)


def first_word(row: Any) -> int:
    """The token that a row's answer begins with; -1 where nothing is learned of it."""
    return next((int(t) for t in row.labels if t >= 0), -1)


def one_hot(row: Any, words: Sequence[int]) -> np.ndarray:
    """[C]; DataError for an answer that begins with none of the words."""
    first = first_word(row)
    if first not in words:
        raise DataError(f"a labelled row's answer begins with token {first}, which is none of method.verbalizer's "
                        f"{list(words)}")
    return np.eye(len(words))[list(words).index(first)]


def label_accuracy(client: Client, theta: Tree, on: str, verbalizer: Sequence[str]) -> dict[str, float]:
    """Share of the held-out rows whose label's word is the likeliest of all; empty where there are none."""
    rows = client.encode(client.held_out(on))
    if not rows:
        return {}
    words = words_of(client, verbalizer)
    z, y = client.measure(theta, rows, Said(words)), np.array([one_hot(row, words).argmax() for row in rows])
    return {"label_accuracy": float((z.argmax(1) == y).mean())}


def surest(p: np.ndarray, count: int, limit: float = 0.0, balanced: bool = False) -> list[int]:
    """At most so many rows of p [rows, C], the surest first, none below `limit`; `balanced`: of each label that is said
    to be the likeliest as many as of the others, or fewer where there are no more."""
    sure, said = p.max(1), p.argmax(1)
    best = [int(i) for i in np.argsort(-sure, kind="stable") if sure[i] >= limit]
    if not balanced:
        return best[:count]
    each, taken, out = max(1, count // p.shape[1]), np.zeros(p.shape[1], int), []
    for i in best:
        if taken[said[i]] < each:
            taken[said[i]] += 1
            out.append(i)
    return out[:count]

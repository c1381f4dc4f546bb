"""Clients that have pictures, texts or both: which kind one is, and which weights of two towers are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.payload import Tree
from fedllm.models.pairs import PairNet

KINDS = ("image", "text", "pair")
PARTS: Mapping[str, tuple[str, ...]] = {
    "image": ("image.", "enter.image.", "map.image.", "head.image."),
    "text": ("text.", "enter.text.", "map.text.", "head.text."),
    "pair": ("image.", "text.", "joint.", "enter.", "map.", "head.pair.")}
"""Where the names of the weights begin that a kind of client has."""


def kind_of(client: Any) -> str:
    """What this client's rows have."""
    parts = set(client.tokens[0].parts)
    if not parts:
        raise DataError(f"client '{client.id}' has rows without a picture and without words")
    return "pair" if len(parts) == 2 else "image" if "pixels" in parts else "text"


def has(kind: str) -> tuple[str, ...]:
    """The modalities of a kind of client."""
    return ("image", "text") if kind == "pair" else (kind,)


def of_kind(theta: Tree, kind: str) -> Tree:
    """The weights that a client of this kind has."""
    return {n: t for n, t in theta.items() if n.startswith(PARTS[kind])}


def need_pairs(model: Any, method: str, needs: Sequence[str] = ()) -> None:
    """CompositionError for a model without two towers, and for a space that lacks trainables that begin so."""
    names = list(model.initial()) if isinstance(model.net, PairNet) else []
    if not names or not all(any(n.startswith(head) for n in names) for head in ("image.", "text.", *needs)):
        raise CompositionError(f"method '{method}' trains two towers, which data.task = {model.task!r} with space "
                               f"'{model.space.stem}' has not; use data.task = 'pairs', model.name = 'pairs', space = "
                               f"'{'complement' if needs else 'full'}'")

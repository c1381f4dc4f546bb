"""Spaces that put something in front of the text, for methods whose payload is a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.layer import name_of
from fedllm.core.method import Method
from fedllm.spaces.space import Space

PROMPTS = ("soft_prompt", "p_tuning", "prefix")


def streams_of(space: Space) -> list[Space]:
    """The spaces of its streams, or itself."""
    return list(getattr(space, "made", {"": space}).values())


def need_prompt(method: Method, model: Any, kinds: Iterable[str] = PROMPTS, beside: Iterable[str] = ()) -> None:
    """CompositionError unless the trainables are one prompt of these kinds, with no more than `beside` next to it."""
    kinds, beside = tuple(kinds), tuple(beside)
    stems = [s.stem for s in streams_of(model.space)]
    if sum(s in kinds for s in stems) != 1 or any(s not in (*kinds, *beside) for s in stems):
        stem, more = name_of(method), f", beside it at most {', '.join(beside)}"
        raise CompositionError(f"method '{stem}' and space '{model.space.stem}' do not fit together: what it sends is "
                               f"a prompt; use one of the spaces {', '.join(kinds)}{more if beside else ''}")


def numbers(model: Any) -> int:
    """How many numbers the network has, the frozen ones too."""
    return sum(p.numel() for p in model.net.parameters())

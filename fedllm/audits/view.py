"""What a curious server gets to read of a round: each reply, or only a sum where a layer hides the single ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedllm.core.ask import Ask
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload
from fedllm.core.reduce import Reducer


class ServerView(Layer):
    """Stands above all layers, where replies arrive decoded, and keeps what came to the server.

    `each[client]` are single replies; under secagg or encryption there are none, and `value` is what the sum told.
    """

    def __init__(self, layers: Sequence[Layer] = ()) -> None:
        self.sums = any(layer.algebra.reveals == "sum" for layer in layers)
        self.each: dict[str, Payload] = {}
        self.value: Payload | None = None
        self.told: dict[str, Payload] = {}
        self.phase = ""

    def server(self, ask: Ask, state: Any) -> Any:
        if ask.at_home:
            return (yield ask)
        self.phase, self.told = ask.phase, dict(ask.msgs)
        if self.sums or ask.reducer is None:
            out = yield ask
            self.value, self.each = out.value, dict(out.each)
            return out
        kept = Kept(ask.reducer)
        out = yield replace(ask, reduce=kept)
        self.value, self.each = out.value, dict(zip(out.folded, kept.replies, strict=True))
        return out


class Kept:
    """A reducer that also keeps a copy of each reply that it takes."""

    def __init__(self, inner: Reducer) -> None:
        self.inner, self.ragged = inner, getattr(inner, "ragged", False)
        self.replies: list[Payload] = []

    def zero(self) -> Any:
        return self.inner.zero()

    def add(self, acc: Any, reply: Payload) -> Any:
        kept = dict(reply)
        acc = self.inner.add(acc, reply)  # one that it refuses is no answer
        self.replies.append(kept)
        return acc

    def done(self, acc: Any) -> Payload:
        return self.inner.done(acc)

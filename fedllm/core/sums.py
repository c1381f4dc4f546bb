"""What the layers that work on sums share: whether a reply is lifted already, and control questions that pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.ask import Ask
from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer, name_of
from fedllm.core.payload import Payload
from fedllm.core.reduce import Lifted, Sum

WHOLE = "_whole/"
"""Stands before the key of an int32 tensor that is in the ring of 2^32 already: it is added as it is."""
LEAST = "_sum/least"
"""In a message: the fewest clients whose sum may be opened; who answers it helps to open no other."""
SMALLEST = 3
"""Clients of a sum in which one may hide: of two each knows the other's part, of one there is nothing to hide among."""

INSTEAD = "a method whose reducer is a Sum works, such as fedavg, flexlora or ffa_lora"


def is_control(ask: Ask) -> bool:
    """A layer's own question without a reducer carries no client data."""
    return isinstance(ask.owner, Layer) and ask.reducer is None


def must_lift(ask: Ask, layer: Layer) -> bool:
    """Whether the client half has to lift the reply; False when a layer above has. Refuses what is no sum."""
    own = ask.fn.__dict__.get("reduce")
    if isinstance(ask.reducer, Lifted):
        return False
    if not isinstance(ask.reducer, Sum) or ask.reducer != own:
        raise CompositionError(refusal(layer, ask.phase, ask.reducer))
    return True


def refusal(layer: Layer, phase: str, reducer: Any) -> str:
    """The sentence for a question that is no sum."""
    need = "every single reply" if reducer is None else f"the reducer {type(reducer).__name__}, which is no Sum"
    return (f"layer '{name_of(layer)}' lets the server see sums only and '{phase}' needs {need}, so they do not "
            f"fit together; {INSTEAD}")


def need_sums(layer: Layer, method: Any, reducers: Mapping[str, Any]) -> None:
    """Refuse a method with a client function, besides evaluation, that is not folded by a Sum."""
    for name, reducer in reducers.items():
        if name not in EVALUATION and not isinstance(reducer, Sum):
            raise CompositionError(refusal(layer, f"{type(method).__name__}.{name}", reducer))


EVALUATION = ("score",)
"""Client functions that run next to the wire, where no layer stands."""


def without(msg: Payload, prefix: str) -> dict[str, Any]:
    """The message without a layer's own keys."""
    return {k: v for k, v in msg.items() if not k.startswith(prefix)}

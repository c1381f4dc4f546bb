"""One stream of the space is everybody's and travels, another is each client's own and never does."""

from __future__ import annotations

from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.layer import name_of
from fedllm.core.method import State
from fedllm.core.payload import Tree, add, pack, part


def need_two(method: Any, model: Any, shared: str, own: str, use: str) -> None:
    """CompositionError unless the model's space is these two streams, of which the second is personal."""
    if {n.partition("/")[0] for n in model.initial()} != {shared, own} or model.space.personal != (own,):
        name = name_of(method)
        raise CompositionError(
            f"method '{name}' and space '{model.space.stem}' do not fit together: it needs two streams of "
            f"which {own} is personal; use space: {use}")


def held(client: Any, own: str) -> Tree:
    """The client's own stream; in its first round the space's start, which changes nothing (B = 0)."""
    return client.memory.get(own) or part(client.model.initial(), own)


def merged(state: State, out: Any) -> State:
    """theta_{t+1} = theta_t + mean_k delta_k, of the stream that travels."""
    return {**state, "theta": add(state["theta"], part(out.value, "delta"))}


def both(msg: Any, client: Any, shared: str, own: str) -> Tree:
    """What came and what stays, as the space names them."""
    return pack(**{shared: part(msg, "theta"), own: held(client, own)})

"""Layers wrap every Ask that passes: privacy, compression, attacks and defenses, each with both its halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from fedllm.core.ask import Ask, Program
from fedllm.core.payload import Payload


class Layer:
    """A step of the protocol stack. Layers are listed from the method down to the wire.

    On the way down and at the server `server` sees the Ask; on the client `client` is climbed from the wire up, so
    that a layer listed first touches the reply first (DP clips before SecAgg masks).
    """

    def init(self) -> MutableMapping[str, Any]:
        """The layer's state at the start: accountant, residue, adaptive clip. Checkpointed with the run."""
        return {}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        """Raise CompositionError when this layer would be unsound over `method` (reducers: by client function)."""

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        """Pass the ask on (changed or not), may ask questions of its own, return the Replies."""
        return (yield ask)

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        """`call(msg)` runs what lies above; change the message before it and the reply after it."""
        return call(msg)

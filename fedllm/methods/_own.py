"""Methods whose clients keep a model of their own, which is what they are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client, ClientInfo
from fedllm.core.method import Method, State
from fedllm.core.payload import Payload, Tree, pack, part


def own(client: Any) -> Tree:
    """The client's own trainables, from `memory["theta"]`; the model's start before there are any."""
    return client.memory.get("theta") or client.model.initial()


class Own(Method):
    """Its clients keep `memory["theta"]`; the server has what it serves, if anything."""

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        theta = self.served(state)[0] if self.serves else {}
        return (yield Ask(self.score, {c.id: pack(theta=theta if c.id == SERVER else {}, on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(part(msg, "theta") or own(client), on=msg["on"])

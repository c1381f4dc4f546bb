"""Methods whose clients do as in FedAvg, and whose own work is the server's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER
from fedllm.core.errors import Withheld
from fedllm.core.method import Star, State
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.core.reduce import Mean


class Averaged(Star):
    """theta <- theta + mean of the clients' changes, by their rows."""

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}


HANDED = "handed"


class Handed(Averaged):
    """The server makes rows before the first round; each client is sent them once, keeps them, and trains with them."""

    written: Callable[..., Any]
    """At the server: {"rows": texts, ...}, whose other entries stand in the state."""

    def making(self, state: State) -> Payload | None:
        """What `written` is told; None: no rows are made."""
        raise NotImplementedError

    def round(self, state: State, clients: Any) -> Program:
        asked = self.making(state)
        if asked is not None and not state["rows"]:
            state = {**state, **(yield Ask(self.written, {SERVER: asked}))[SERVER]}
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"], kept=c.id in state["told"], rows=(
            [] if c.id in state["told"] else state["rows"])) for c in clients})
        silent = {c.id for c in clients} - set(out.answered)  # who has lost them is sent them again
        return {**self.merge(state, out), "told": sorted(({*state["told"]} - silent) | {*out.answered})}

    def handed(self, msg: Payload, client: Any) -> list[str]:
        """The rows, from the message or from before; Withheld by a client that has lost them."""
        if not msg["kept"]:
            client.memory[HANDED] = list(msg["rows"])
        elif HANDED not in client.memory:
            raise Withheld(f"client '{client.id}' has lost the rows that it was sent; it gets them again")
        return client.memory[HANDED]

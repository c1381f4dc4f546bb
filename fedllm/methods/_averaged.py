"""Methods whose clients do as in FedAvg, and whose own work is the server's."""

from __future__ import annotations

from typing import Any

from fedllm.core.ask import on_client
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

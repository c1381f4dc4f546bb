"""FedAvg that begins where the server got on rows that are nobody's: synthetic ones, public ones, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.method import Star, State, knob
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.gate.made import read


@dataclass(frozen=True)
class WarmStart(Star):
    """Before its first round it has rows gathered, and the server trains on them; then it is FedAvg."""

    warm_steps: int = knob(100, "steps of the server on these rows, before the first round; 0: none, FedAvg", ge=0)

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "warm": not self.warm_steps, "rows": 0}

    def gathered(self, state: State, clients: Any) -> Program:
        """Returns the rows that the server trains on, each as it would cross the wire (`gate/made.py`)."""
        raise NotImplementedError

    def round(self, state: State, clients: Any) -> Program:
        if not state["warm"]:
            rows = yield from self.gathered(state, clients)
            state = {**state, "warm": True, "rows": len(rows)}
            if rows:
                out = yield Ask(self.warmed, {SERVER: pack(theta=state["theta"], rows=list(rows))})
                state = {**state, "theta": part(out[SERVER], "theta")}
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        return self.merge(state, out)

    @on_server
    def warmed(self, msg: Payload, client: Any) -> Payload:
        rows = plain(msg["rows"])
        fitted = client.fit(part(msg, "theta"), on=rows, steps=self.warm_steps)
        return pack(theta=fitted.theta, loss=fitted.loss)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        w = part(msg, "theta")
        fitted = client.fit(w)
        return pack(delta=sub(fitted.theta, w), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def report(self, state: State) -> dict[str, Any] | None:
        return {"warm_rows": state["rows"]} if state["rows"] else None


def plain(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows without what they say of their making; a text that the gate made empty is none."""
    return [read(t)[0] for t in texts if t]

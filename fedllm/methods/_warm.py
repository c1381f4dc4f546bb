"""FedAvg that begins where the server got on rows that are nobody's: synthetic ones, public ones, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.client import SERVER
from fedllm.core.method import State, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.gate.made import read
from fedllm.methods._averaged import Averaged


@dataclass(frozen=True)
class WarmStart(Averaged):
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

    def report(self, state: State) -> dict[str, Any] | None:
        return {"warm_rows": state["rows"]} if state["rows"] else None


def plain(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows without what they say of their making; a text that the gate made empty is none."""
    return [read(t)[0] for t in texts if t]

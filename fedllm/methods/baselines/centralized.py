"""Centralized: put all rows in one place and train there, which no federation may do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.client import SERVER
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.core.reduce import Mean


@dataclass(frozen=True)
class Centralized(Method):
    """Pooled training on the server with as much work as all clients of a round together: the upper anchor."""

    simulation_only = "needs all clients' rows in one place"
    card = Card(
        title="Centralized: pooled training",
        paper="none; the upper anchor",
        topic="baselines",
        sends="nothing; it needs the raw rows in one place",
        needs="a simulation; any model and space",
        claim=Claim("pooled training reaches a lower loss on the IID test than FedAvg, for the same number of examples",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<=", threshold=0.0, wins=5),
        evidence="A round trains on as many examples as its clients would have, in one go and one after the other.",
    )
    trial = Trial(silent="it asks no client")
    match: Literal["examples", "steps"] = knob(
        "examples", "what a round has as much of as all its clients together", options=("examples", "steps"))

    def round(self, state: State, clients):
        msg = pack(theta=state["theta"], rows=[c.n for c in clients])
        out = yield Ask(self.pooled, {SERVER: msg})
        return {**state, "theta": part(out.value, "theta")}

    @on_client(reduce=Mean(), gives="theta: tree, n: rows, loss?: number")
    def pooled(self, msg, client):
        local = client.training
        steps = [local.count(n) for n in msg["rows"]]  # what each client of the round would have taken
        seen = sum(h * n / math.ceil(n / local.lot) for h, n in zip(steps, msg["rows"], strict=True))
        total = sum(steps) if self.match == "steps" else max(1, round(seen / min(local.lot, sum(msg["rows"]))))
        fitted = client.fit(part(msg, "theta"), steps=total)
        return pack(theta=fitted.theta, n=1, loss=fitted.loss)

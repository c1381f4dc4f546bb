"""LocalOnly: nobody talks to anybody; what each client reaches alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State
from fedllm.core.payload import pack


@dataclass(frozen=True)
class LocalOnly(Star):
    """Every client trains its own model on its own rows: the lower anchor of every federated and personalized claim."""

    card = Card(
        title="Local only: no federation",
        paper="none; the lower anchor",
        topic="baselines",
        sends="nothing in either direction",
        needs="any model and space; clients that remember",
        claim=Claim("under label skew each client's own model fits its own kind of data better than the global model",
                    rig="label_skew", metric="local_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0, wins=4),
        evidence="Optimizer state starts afresh each round, as in the methods that it is compared with.",
    )

    serves, mixes = False, "models"

    def down(self, state: State, client) -> dict:
        return {}

    @on_client(gives="")
    def local(self, msg, client):
        theta = client.memory.get("theta") or client.model.initial()
        client.memory["theta"] = client.fit(theta).theta
        return {}

    def merge(self, state: State, out) -> State:
        return state

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: pack(on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(client.memory.get("theta") or client.model.initial(), on=msg["on"])

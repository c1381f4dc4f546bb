"""Methods whose clients act by one shared policy, or each by its own for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program
from fedllm.core.client import Client
from fedllm.core.method import Star, State, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, sub


@dataclass(frozen=True)
class Policies(Star):
    """theta <- theta + mean_k (theta_k - theta); with `share: nothing` every theta_k stays where it is."""

    share: Literal["policy", "nothing"] = knob("policy", "nothing: each client keeps its own policy, for comparison",
                                               options=("policy", "nothing"))

    @property
    def serves(self) -> bool:  # type: ignore[override]
        return self.share == "policy"

    def down(self, state: State, client: Any) -> Payload:
        return pack(theta=state["theta"]) if self.serves else {"alone": True}

    def own(self, msg: Payload, client: Client) -> Tree:
        """The policy that this client acts by."""
        return part(msg, "theta") or client.memory.get("theta") or client.model.initial()

    def told(self, client: Client, start: Tree, theta: Tree, **figures: Any) -> Payload:
        """What a client says of what it has learned."""
        if self.serves:
            return pack(delta=sub(theta, start), **figures)
        client.memory["theta"] = theta
        return figures

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))} if self.serves else state

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

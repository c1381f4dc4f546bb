"""Profit: federate a prompt, then let each client tune it at home; what it wins there, and what it forgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub, tree_map
from fedllm.core.reduce import Mean
from fedllm.local.terms import Proximal
from fedllm.methods._prompts import need_prompt

SLOW = {"rounds": 16, "knobs": {"federated": 8, "rate": 0.1}}
FAST = {"rounds": 16, "knobs": {"federated": 8, "rate": 1.0}}
SHORT = {"rounds": 9, "knobs": {"federated": 8, "rate": 1.0}}


@dataclass(frozen=True)
class Profit(Method):
    """min_v L_k(v) + lam/2 ||v - u||^2 from the federated prompt u; the client uses share v + (1 - share) u."""

    card = Card(
        title="Profit: personalization against robustness in federated prompt tuning",
        paper="Collins et al., Profit: Benchmarking Personalization and Robustness Trade-off in Federated Prompt "
              "Tuning, FL@FM-NeurIPS 2023, arXiv 2310.04627",
        topic="personalization",
        sends="while it federates as FedAvg: the prompt and its change; then the prompt alone, down",
        needs="a prompt space; with space.start_from the prompt of any method, and `federated: 0`; clients with test "
              "rows of their own beside the global test",
        claim=Claim("tuned at a tenth of the rate in as many rounds a client's prompt is better on everybody's rows",
                    rig="profit", metric="global_loss", baseline="profit", relative="difference", holds="<",
                    threshold=0.0, options=SLOW, against=FAST),
        also={"between": Claim("half way between the shared prompt and one tuned for one round it is better on "
                               "everybody's rows than there", rig="profit", metric="global_loss", baseline="profit",
                               relative="difference", holds="<", threshold=0.0,
                               options={**SHORT, "knobs": {**SHORT["knobs"], "share": 0.5}}, against=SHORT),
              "wins": Claim("a client's own prompt is better on its own rows than the shared one (share 0)",
                            rig="profit", metric="local_loss", baseline="profit", relative="difference", holds="<",
                            threshold=0.0, options=SLOW,
                            against={"rounds": 16, "knobs": {"federated": 8, "rate": 0.1, "share": 0.0}})},
        evidence="Abstract read; no code is public. A protocol and no algorithm: `fedllm compare "
                 "recipes/families/profit.yaml` runs its grid, whose two axes are the columns of a comparison: the "
                 "clients' models on the global test, and on their own.",
    )
    serves = False
    trial = Trial({"federated": 1, "share": 0.5, "lam": 0.1}, {"name": "soft_prompt", "length": 3})

    federated: int = knob(5, "rounds of FedAvg before clients tune for themselves", ge=0)
    rate: float = knob(1.0, "their learning rate then, in multiples of local.lr", gt=0)
    lam: float = knob(0.0, "weight of the distance from the shared prompt, lam/2 ||v - u||^2", ge=0)
    share: float = knob(1.0, "of its own prompt in what a client uses; 0: the shared one", ge=0, le=1)

    def check(self, model: Any) -> None:
        need_prompt(self, model, beside=("head",))

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0}

    def round(self, state: State, clients) -> Program:
        told = {c.id: pack(theta=state["theta"]) for c in clients}
        if state["round"] >= self.federated:
            yield Ask(self.personal, told)
            return {**state, "round": state["round"] + 1}
        out = yield Ask(self.local, told)
        return {"theta": add(state["theta"], part(out.value, "delta")), "round": state["round"] + 1}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Any, client: Any):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    @on_client(gives="")
    def personal(self, msg: Any, client: Any):
        """One more round of a client's own v, which never leaves it."""
        u = part(msg, "theta")
        terms = [Proximal(self.lam, u)] if self.lam else []
        client.memory["v"] = client.fit(client.memory.get("v") or u, terms=terms, rate=self.rate).theta
        return {}

    def used(self, u: Tree, v: Mapping[str, Tensor] | None) -> Tree:
        """share v + (1 - share) u, exactly u or v at the ends."""
        return u if v is None else tree_map(lambda a, b: torch.lerp(a, b, self.share), u, v)

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Any, client: Any):
        return client.score(self.used(part(msg, "theta"), client.memory.get("v")), on=msg["on"])

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

"""Personal models on confidential data: a shared adapter crosses as a hidden sum, a personal one never leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import pack, part, sub, zeros_like
from fedllm.core.reduce import Mean
from fedllm.local.terms import Proximal
from fedllm.methods._streams import both, held, merged, need_two

LR = {"local.lr": (3e-3, 1e-2, 3e-2)}
USE = ("{name: streams, of: {shared: {name: lora, rank: 8}, own: {name: lora, rank: 4}}, personal: [own]}")


@dataclass(frozen=True)
class ConfidentialPFL(Star):
    """W_0 + s B A + s_k B_k A_k: phase S trains B A while B_k A_k rests, phase K B_k A_k over the B A that came."""

    card = Card(
        title="Personalized federated learning on confidential data",
        paper="No single paper: the goal of the survey's section 4.1 (personal agents tuned on confidential data), "
              "with FedLoRA's two adapters under clipping, shared noise and secure sums",
        topic="personalization",
        sends="down: the shared adapter; up: its change, hidden in a sum; the personal adapter never",
        needs="space streams of two adapters, shared and own (personal); a layer that hides single updates (secagg, "
              "secagg_plus, he_ckks, ...); clients that remember",
        claim=Claim("where each client names half of the classes in its own way, its model is right more often on its "
                    "own rows than FedAvg's with the shared adapter alone, on as many steps", rig="own_names",
                    metric="local_accuracy", baseline="fedavg", relative="difference", holds=">", threshold=0.0,
                    grid=LR),
        also={"alone": Claim("and than what the client trains alone", rig="own_names", metric="local_accuracy",
                             baseline="local_only", relative="difference", holds=">", threshold=0.0, grid=LR)},
        evidence="All clients weigh the same, since row counts are not public under DP. Under `dp_sgd` phase K is "
                 "noised as well: the shared gradient passes through the personal adapter, so an adapter trained "
                 "without noise would carry single rows into it. `dp_fedavg` clips and noises what leaves alone.",
    )
    trial = Trial(space={"name": "streams", "of": {"shared": {"name": "lora", "rank": 2},
                                                   "own": {"name": "lora", "rank": 2}}, "personal": ("own",)},
                  local={"steps": 4}, knobs={"open_updates": True})

    personal_share: float = knob(0.3, "share of a round's steps that train the personal adapter, rounded", ge=0, lt=1)
    personal_l2: float = knob(0.0, "mu of mu/2 ||own||^2 in phase K", ge=0)
    open_updates: bool = knob(False, "run without a layer that hides single updates, for comparisons")

    def check(self, model: Any) -> None:
        need_two(self, model, "shared", "own", USE)

    def check_layers(self, layers) -> None:
        if not self.open_updates and not any(x.algebra.kind in ("secagg", "he") for x in layers):
            raise CompositionError("method 'confidential_pfl' without a layer that hides single updates keeps nothing "
                                   "confidential from the server; list secagg, secagg_plus or he_ckks in layers, or "
                                   "say method.open_updates: true to run it as a comparison")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": part(model.initial(), "shared")}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        shared, own = part(msg, "theta"), held(client, "own")
        steps = client.training.count(client.n)
        mine = round(self.personal_share * steps)
        first = client.fit(pack(shared=shared, own=own), freeze=["own/*"], steps=steps - mine)  # phase S
        if mine:
            small = Proximal(self.personal_l2, pack(own=zeros_like(own)))
            second = client.fit(pack(shared=shared, own=own), freeze=["shared/*"], steps=mine,  # phase K
                                terms=[small] if self.personal_l2 else [])
            client.memory["own"] = part(second.theta, "own")
        return pack(delta=sub(part(first.theta, "shared"), shared), n=1, loss=first.loss)

    def merge(self, state: State, out: Any) -> State:
        return merged(state, out)

    def served(self, state: State):
        return pack(shared=state["theta"]), None

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(both(msg, client, "shared", "own"), on=msg["on"])

"""pFedLoRA: clients whose networks differ in design share a small head of one shape, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.local.objectives.beside import DOWN, UP, Beside

LR = {"local.lr": (1e-3, 2e-3, 5e-3)}
MIXED = {"shift": 0.5, "rows": 80, "mixed": True, "space": {"name": "full"}}


@dataclass(frozen=True)
class PFedLoRA(Star):
    """First the own model learns beside the shared head, which rests; then the head, while the model rests."""

    card = Card(
        title="pFedLoRA: model-heterogeneous federated learning with a low-rank adapter",
        paper="Yi et al., pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning, 2023, arXiv "
              "2310.13283 (FedLoRA in its first version)",
        topic="model heterogeneity",
        sends="both ways: the head d -> a -> C, whatever the client's network; the network never",
        needs="task classification, the same labels and width of pooled states everywhere; clients that remember; any "
              "`models`",
        claim=Claim("clients of two designs are right about as often as when each trains alone on as many steps of its "
                    "model: at most one point less", rig="shift", metric="accuracy", baseline="local_only",
                    relative="difference", holds=">=", threshold=-0.01, options=MIXED, grid=LR),
        also={"gain": Claim("and more often than alone", rig="shift", metric="accuracy", baseline="local_only",
                            relative="difference", holds=">", threshold=0.0, options=MIXED, grid=LR)},
        evidence="Abstract; the algorithm from memory; no code was to be had. The dossier's trial showed no gain. Both "
                 "phases take `local`'s steps: the shared head costs as many again.",
    )
    trial = Trial({"adapter_rank": 4}, space={"name": "full"}, task="classification")
    serves, mixes = False, "models"

    mu: float = knob(0.5, "share of the shared head in what the own model descends; 0: training alone", ge=0, le=1)
    adapter_rank: int = knob(16, "a: hidden units of the shared head", ge=1)

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'pfedlora' and data.task = {model.task!r} do not fit together: it shares a "
                                   "head of classes; use data.task = 'classification'")
        if self.adapter_rank > (d := width(model)):
            raise CompositionError(f"method.adapter_rank = {self.adapter_rank} is not allowed; it must be <= {d}, the "
                                   "width of the model's pooled states")

    def init(self, model: Any) -> State:
        self.check(model)
        rng, theta = torch_stream(model.seed, "pfedlora"), Tree()
        for name, (o, i) in {DOWN: (self.adapter_rank, width(model)),
                             UP: (len(model.labels), self.adapter_rank)}.items():
            theta[f"{name}.weight"] = (torch.rand(o, i, generator=rng) * 2 - 1) / math.sqrt(i)
            theta[f"{name}.bias"] = torch.zeros(o)
        return {"theta": theta}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        head, own = part(msg, "theta"), client.memory.get("theta") or client.model.initial()
        if (sent := head[f"{DOWN}.weight"].shape[1]) != (here := width(client.model)):
            raise CompositionError(f"client '{client.id}' has pooled states of width {here} and the shared head reads "
                                   f"{sent}: two designs without a shared adapter; give it a model of that width")
        # (G_k, H_k): mu CE(A(r), y) + (1 - mu) CE(H_k(r), y), A at rest
        mine = client.fit({**own, **head}, freeze=["adapter.*"], objective=Beside(self.mu))
        kept = {n: x for n, x in mine.theta.items() if n not in head}
        # A: CE(A(r), y), the model at rest
        theirs = client.fit({**kept, **head}, freeze=list(kept), objective=Beside(1.0))
        client.memory["theta"] = kept
        return pack(delta=sub({n: theirs.theta[n] for n in head}, head), n=client.n, loss=mine.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": add(state["theta"], part(out.value, "delta"))}

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(client.memory.get("theta") or client.model.initial(), on=msg["on"])


def width(model: Any) -> int:
    """Of a row's pooled state."""
    return int(model.net.config.hidden_size)

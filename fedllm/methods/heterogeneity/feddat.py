"""FedDAT: a shared adapter learns from labels and from a teacher of two, and the own one from the shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.distill import Distill, teacher_logits
from fedllm.spaces.dual_adapter import DualAdapter

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}
DUAL = {"shift": 0.5, "rows": 120, "space": {"name": "dual_adapter", "size": 12}}
ONE = {"space": {"name": "adapter", "size": 12}}


@dataclass(frozen=True)
class FedDAT(Star):
    """Batch by batch: the shared adapter agrees with the dual teacher (own and the frozen round's start), and the dual
    with what the shared one said before its step."""

    card = Card(
        title="FedDAT: dual-adapter teacher",
        paper="Chen et al., FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal Heterogeneous Federated "
              "Learning, AAAI 2024, arXiv 2308.12305",
        topic="heterogeneity",
        sends="down: the shared adapter; up: its change, the training loss; the own adapter and the head never",
        needs="task classification; the space dual_adapter; clients that remember",
        claim=Claim("where clients write half of their words in a code of their own, the two adapters together are "
                    "right more often on the client's rows than FedAvg's one", rig="shift", metric="accuracy",
                    baseline="fedavg", relative="difference", holds=">", threshold=0.0, options=DUAL, against=ONE,
                    grid=LR, unequal="two optimizer steps a batch, one for each adapter, on the same batches"),
        also={"distil": Claim("distillation costs accuracy at this size: with both adapters learning from labels alone "
                              "it is right more often", rig="shift", metric="accuracy", baseline="feddat",
                              relative="difference", holds="<", threshold=0.0, better="max", options=DUAL, grid=LR,
                              against={"knobs": {"distill_weight": 0.0}}),
              "alone": Claim("and it is right more often than an adapter that the client trains alone", rig="shift",
                             metric="accuracy", baseline="local_only", relative="difference", holds=">", threshold=0.0,
                             options=DUAL, against=ONE, grid=LR, unequal="two optimizer steps a batch")},
        evidence="Authors' code read by the dossier: the mean is uniform, one optimizer drives both steps there (here "
                 "each has its own, fresh each round), and its learned gate is overridden by 0.5. Texts here, not "
                 "pictures with questions.",
    )
    trial = Trial(space={"name": "dual_adapter", "size": 4}, task="classification", local={"steps": 2})
    serves = only_fits = False

    temperature: float = knob(3.0, "T of both distillations", gt=0)
    distill_weight: float = knob(0.5, "share of distillation in each step; 0: two adapters by themselves", ge=0, le=1)
    use: Literal["dual", "personal", "shared"] = knob("dual", "which adapters each client is tested with",
                                                      options=("dual", "personal", "shared"))

    def check(self, model: Any) -> None:
        if model.task != "classification" or not isinstance(model.space, DualAdapter):
            raise CompositionError(f"method 'feddat', data.task = {model.task!r} and space '{model.space.stem}' do not "
                                   "fit together: it trains two adapters against each other's class predictions; use "
                                   "data.task = 'classification' and the space 'dual_adapter'")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": part(model.initial(), "shared")}

    def own(self, client: Any) -> tuple[Tree, Tree]:
        """The own adapter, and the own head."""
        first = client.model.initial()
        kept = client.memory.get("own") or {n: x for n, x in first.items() if not n.startswith("shared/")}
        return pack(own=part(kept, "own")), {n: x for n, x in kept.items() if "/" not in n}

    @on_client(reduce=Mean("uniform"), gives="delta: tree, loss?: number")
    def local(self, msg, client):
        came = part(msg, "theta")
        mine, head = self.own(client)
        shared, frozen, losses = pack(shared=came), pack(shared=came), []  # a_f is a_s as received
        moments: list[Any] = [None, None]
        rows = client.tokens
        for batch in client.batches(client.training.count(client.n)):
            some = [rows[i] for i in batch]
            one, both = {**shared, **head}, {**mine, **frozen, **head}
            z_t, z_s = (torch.from_numpy(client.measure(t, some, teacher_logits)) for t in (both, one))
            student = client.fit(one, on=some, steps=1, moments=moments[0], **self.teach(z_t))
            losses.append(student.loss)
            shared = pack(shared=part(student.theta, "shared"))
            head = {n: student.theta[n] for n in head}
            dual = client.fit({**mine, **frozen, **head}, on=some, steps=1, moments=moments[1], freeze=["shared/*"],
                              **self.teach(z_s))
            mine, head = pack(own=part(dual.theta, "own")), {n: dual.theta[n] for n in head}
            moments = [student.moments, dual.moments]
        client.memory["own"] = {**mine, **head}
        return pack(delta=sub(part(shared, "shared"), came), loss=sum(losses) / max(1, len(losses)))

    def teach(self, z: torch.Tensor) -> dict[str, Any]:
        """(1 - w) CE + w T^2 KL to what the other said of the same rows."""
        how = Distill(temperature=self.temperature, ce=1 - self.distill_weight)
        return {"objective": how, "side": {"teacher": list(z)}}

    def merge(self, state: State, out: Any) -> State:
        return {"theta": add(state["theta"], part(out.value, "delta"))}  # a_s <- mean_k a_s,k, all alike

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        mine, head = self.own(client)
        shared = pack(shared=part(msg, "theta"))
        theta = {"dual": {**mine, **shared}, "personal": mine, "shared": shared}[self.use]
        return client.score({**theta, **head}, on=msg["on"])

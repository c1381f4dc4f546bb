"""Several foundation models teach a small one at the server, on rows without labels; clients then federate it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.core.rng import torch_stream
from fedllm.local.objectives.features import Features, maps, pooled, shares
from fedllm.methods._averaged import Averaged
from fedllm.models.encoder import HeadedEncoder

LR = {"local.lr": (1e-3, 2e-3, 5e-3)}
ONE = {"knobs": {"teachers": ("first",)}}


@dataclass(frozen=True)
class MultiFMKD(Averaged):
    """Stage 1, once: linear maps of the student's pooled state learn to say what each teacher's state of a public row
    is, and are dropped. Stage 2: FedAvg of the student on the clients' labels."""

    card = Card(
        title="Knowledge distillation from multiple foundation models",
        paper="Yang, Li, Zhang, Woodland, Knowledge Distillation from Multiple Foundation Models for End-to-End Speech "
              "Recognition, 2023, arXiv 2303.10917",
        topic="distillation",
        sends="both ways: the student's trainables, as FedAvg; the teachers never leave the server",
        needs="task classification; public rows at the server; encoders among the recipe's `models`",
        claim=Claim("a student of two teachers who know another half of the labels each is right more often than one "
                    "of the first alone, after as many federated steps", rig="views", metric="accuracy",
                    baseline="multi_fm_kd", relative="difference", holds=">", threshold=0.0, grid=LR, against=ONE),
        also={"second": Claim("and than one of the second alone", rig="views", metric="accuracy",
                              baseline="multi_fm_kd", relative="difference", holds=">", threshold=0.0, grid=LR,
                              against={"knobs": {"teachers": ("second",)}}),
              "start": Claim("and than FedAvg from the student's own start, on as many client steps", rig="views",
                             metric="accuracy", baseline="fedavg", relative="difference", holds=">", threshold=0.0,
                             grid=LR, unequal="the server trains first")},
        evidence="Abstract; the form of the loss from memory. Speech there, text here: one pooled state a row, so no "
                 "frames to match; teachers' states are normed over their width. Clients learn labels alone.",
    )
    trial = Trial({"teachers": ("first", "second"), "pretrain_steps": 2}, space={"name": "full"}, task="classification",
                  models={"first": "classification", "second": "classification"})

    teachers: tuple[str, ...] = knob(("teacher",), "encoders among the recipe's `models`")
    weights: tuple[float, ...] = knob((), "of each teacher, made to sum to 1; none: all alike")
    loss: Literal["l1cos", "mse"] = knob("l1cos", "how far a state is from the teacher's", options=("l1cos", "mse"))
    pretrain_steps: int = knob(200, "steps of stage 1; 0: FedAvg", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares(self.weights, self.teachers, "MultiFMKD")

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'multi_fm_kd' and data.task = {model.task!r} do not fit together: it "
                                   "teaches pooled states; use data.task = 'classification'")

    def check_named(self, main: Any, models: Mapping[str, Any]) -> None:
        for name, model in models.items():
            if not isinstance(getattr(model, "net", None), HeadedEncoder) or model.net.pooling == "each":
                raise CompositionError(f"models.{name}: method 'multi_fm_kd' needs a row's pooled state, which an "
                                       "encoder for task classification or embedding has")

    def server_asks_for(self):
        return self.teachers if self.pretrain_steps else ()

    def public_at(self):
        return ("server",) if self.pretrain_steps else ()

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "taught": not self.pretrain_steps}

    def round(self, state: State, clients) -> Program:
        if not state["taught"]:
            met = yield Ask(self.teach, {SERVER: pack(theta=state["theta"])})
            state = {**state, "theta": part(met[SERVER], "theta"), "taught": True}
        return (yield from super().round(state, clients))

    @on_server
    def teach(self, msg, client):
        theta, said = part(msg, "theta"), []
        for name in self.teachers:
            held = client.holding(name)
            self.check_named(client.model, {name: held.model})
            said.append(held.measure(held.model.initial(), held.public, pooled))
        t = np.concatenate(said, 1)  # [rows, sum of widths]
        widths = tuple(x.shape[1] for x in said)
        heads = maps(client.model.net.config.hidden_size, widths, torch_stream(client.model.seed, "multi_fm_kd"))
        goal = Features(widths, shares(self.weights, self.teachers, "MultiFMKD"), self.loss)
        fitted = client.fit({**theta, **heads}, on=client.public, steps=self.pretrain_steps, objective=goal,
                            side={"target": list(torch.from_numpy(t))})
        return pack(theta={n: fitted.theta[n] for n in theta}, loss=fitted.loss)  # W_j are dropped

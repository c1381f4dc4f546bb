"""FedPCL: nobody's weights travel; clients learn from each other's class prototypes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.form import need, shaped
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.local.objectives.prototypes import Prototypes, representation
from fedllm.spaces.mlp_head import MLPHead

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}
STRONG = {"shift": 0.5, "rows": 80, "space": {"name": "mlp_head", "size": 32}}


@dataclass(frozen=True)
class FedPCL(Method):
    """Each client trains a projection of frozen features towards its classes' prototypes, the mean and each's."""

    card = Card(
        title="FedPCL: prototype-wise contrastive learning",
        paper="Tan et al., Federated Learning from Pre-Trained Models: A Contrastive Learning Approach, NeurIPS 2022, "
              "arXiv 2209.10083",
        topic="model heterogeneity",
        sends="up: a vector of each class that the client has rows enough of; down: the mean of these, and each "
              "client's own (`share: all_sets`)",
        needs="task classification, the same labels everywhere; the space mlp_head; clients that remember",
        claim=Claim("where clients write half of their words in a code of their own, each is right more often on its "
                    "own rows than with FedAvg of the same head", rig="shift", metric="accuracy", baseline="fedavg",
                    relative="difference", holds=">", threshold=0.0, options=STRONG, grid=LR),
        also={"alone": Claim("and more often than with the head that it trains alone", rig="shift", metric="accuracy",
                             baseline="local_only", relative="difference", holds=">", threshold=0.0, options=STRONG,
                             grid=LR),
              "mild": Claim("where a tenth of the words are coded FedAvg of the head is right more often", rig="shift",
                            metric="accuracy", baseline="fedavg", relative="difference", holds="<", threshold=0.0,
                            better="max", options={**STRONG, "shift": 0.1, "rows": 32}, grid=LR)},
        evidence="Authors' code read by the dossier; one frozen encoder here, and round 0, in which there are no "
                 "prototypes, trains the head by cross-entropy. Its variant of a batch's features as candidates is "
                 "left out.",
    )
    trial = Trial({"least": 1}, space={"name": "mlp_head", "size": 8}, task="classification",
                  rounding="a nearest prototype may be another after rounding")
    serves = only_fits = False
    metrics: ClassVar = {"prototype_accuracy": "max"}

    temperature: float = knob(0.07, "tau of the contrast", gt=0)
    share: Literal["all_sets", "global_only"] = knob("all_sets", "what clients are told: the mean prototypes and every "
                                                     "client's, or the mean alone", options=("all_sets", "global_only"))
    least: int = knob(2, "rows of a class below which no prototype is sent: one row's is the row", ge=1)

    def check(self, model: Any) -> None:
        if model.task != "classification" or not isinstance(model.space, MLPHead):
            raise CompositionError(f"method 'fedpcl', data.task = {model.task!r} and space '{model.space.stem}' do not "
                                   "fit together: prototypes are means of a hidden layer by class; use data.task = "
                                   "'classification' and the space 'mlp_head'")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"sets": {}, "wide": model.space.size, "classes": len(model.labels)}

    def round(self, state: State, clients) -> Program:
        told = pack(mean=mean_of(state["sets"]), wide=state["wide"], classes=state["classes"])
        if self.share == "all_sets":
            told |= pack(sets={f"{c}/{y}": v for c, mine in state["sets"].items() for y, v in mine.items()})
        out = yield Ask(self.local, {c.id: told for c in clients})
        return {**state, "sets": {**state["sets"], **{c: part(out[c], "proto") for c in out}}}

    def fits(self, msg: Any, reply: Any) -> None:
        for name, v in part(reply, "proto").items():
            need(name in map(str, range(msg["classes"])), f"'proto/{name:.40}' is no class, allowed are 0 to "
                                                          f"{msg['classes'] - 1}")
            shaped(f"proto/{name}", v, (msg["wide"],))

    @on_client(gives="proto?: tensors, loss?: number", fits=fits)
    def local(self, msg, client):
        theta, mean = client.memory.get("theta") or client.model.initial(), part(msg, "mean")
        if mean:
            sets, known = self.filled(msg, mean, client.model)
            fitted = client.fit(theta, objective=Prototypes(self.temperature),
                                side={"sets": [sets] * client.n, "known": [known] * client.n})
        else:
            fitted = client.fit(theta)
        client.memory["theta"] = fitted.theta
        z = torch.from_numpy(client.measure(fitted.theta, client.tokens, representation))  # [n, d]
        y = np.array([int(row.labels) for row in client.tokens])
        own = {str(c): z[y == c].mean(0) for c in np.unique(y)}
        client.memory["own"] = own
        return pack(proto={c: v for c, v in own.items() if (y == int(c)).sum() >= self.least}, loss=fitted.loss)

    def filled(self, msg: Any, mean: Mapping[str, Tensor], model: Any) -> tuple[Tensor, Tensor]:
        """[S, C, d] with the mean where a client lacks a class, and which classes anybody has [C]."""
        classes, like = len(model.labels), next(iter(mean.values()))
        by: dict[str, dict[str, Tensor]] = {}
        for key, v in part(msg, "sets").items():
            who, _, c = key.rpartition("/")
            by.setdefault(who, {})[c] = v
        blank = torch.zeros_like(like)
        full = [{**mean, **mine} for mine in ({}, *by.values())]
        rows = [torch.stack([one.get(str(c), blank) for c in range(classes)]) for one in full]
        return torch.stack(rows), torch.tensor([float(str(c) in mean) for c in range(classes)])

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(mean=mean_of(state["sets"]), on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        """What the head says, and how often the nearest prototype (one's own, else everybody's) is of the right class.
        """
        theta = client.memory.get("theta") or client.model.initial()
        told, rows = client.score(theta, on=msg["on"]), client.encode(client.held_out(msg["on"]))
        known = {**part(msg, "mean"), **client.memory.get("own", {})}
        if not rows or not known:
            return told
        z = client.measure(theta, rows, representation)
        far = np.stack([np.linalg.norm(z - v.numpy(), axis=1) for v in known.values()], 1)
        said = np.array([int(c) for c in known])[far.argmin(1)]
        return {**told, "prototype_accuracy": float((said == [int(r.labels) for r in rows]).mean())}


def mean_of(sets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of each class the mean prototype over the clients that have one, all alike."""
    held: dict[str, list[Tensor]] = {}
    for mine in sets.values():
        for c, v in mine.items():
            held.setdefault(c, []).append(v)
    return {c: torch.stack(vs).mean(0) for c, vs in sorted(held.items())}

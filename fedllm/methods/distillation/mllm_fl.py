"""MLLM-FL: a big model stays at the server; it teaches the small one before, and sets its rare classes right after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, Withheld
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.local.objectives.composed import Composed
from fedllm.local.objectives.distill import teacher_logits
from fedllm.local.objectives.features import Features, maps, pooled
from fedllm.methods._averaged import Averaged
from fedllm.methods._written import balanced, named, need_parts, said_by
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model

LR = {"local.lr": (1e-3, 2e-3, 5e-3)}
GATES = (0.0, 0.25, 0.5, 0.75)
"""a of f = a f_small + (1 - a) f_big, in the four parts of stage 1."""


@dataclass(frozen=True)
class MLLMFL(Averaged):
    """1: the small model's states are drawn to the big one's, ever less. 2: FedAvg. 3: on public rows that the big
    model labels, as many of each class, the shared model learns CE(y, p) + beta KL(q || p)."""

    card = Card(
        title="MLLM-assisted federated learning (MLLM-LLaVA-FL)",
        paper="Zhang et al., MLLM-LLaVA-FL: Multimodal Large Language Model Assisted Federated Learning, WACV 2025, "
              "arXiv 2409.06067",
        topic="distillation",
        sends="both ways: the small model's trainables, as FedAvg; nothing of the big model",
        needs="task classification; public rows at the server, whose labels are not read; a classifier `teacher` among "
              "the recipe's `models` (of pictures or texts), or a language model or endpoint that names a class",
        claim=Claim("where classes are long-tailed (50 to 1) the rarest third is told right more often than by FedAvg, "
                    "by 5 points or more", rig="tailed", metric="tail", baseline="fedavg", relative="difference",
                    holds=">=", threshold=0.05, grid=LR, unequal="the server trains too"),
        also={"overall": Claim("at no more than a point of accuracy over all classes", rig="tailed",
                               metric="accuracy", baseline="fedavg", relative="difference", holds=">=",
                               threshold=-0.01, grid=LR, unequal="the server trains too"),
              "teacher": Claim("and more often than with the big model's labels without its probabilities",
                               rig="tailed", metric="tail", baseline="mllm_fl", relative="difference", holds=">",
                               threshold=0.0, grid=LR, against={"knobs": {"beta": 0.0}})},
        evidence="Abstract, for stages and loss; the gate is ours: drawing f_small to a f_small + (1 - a) f_big is "
                 "drawing it to f_big by (1 - a)^2, in four parts. Captions and the image-text contrast of stage 1 are "
                 "left out. Public rows must be none of the test's.",
    )
    trial = Trial({"pretrain_steps": 4, "align_steps": 2, "each_class": 1}, space={"name": "full"},
                  task="classification", models={"teacher": "classification"}, rounding="a label is a choice")

    teacher: str = knob("teacher", "the big model, by its name among the recipe's `models`")
    stages: Literal["1,2,3", "2,3", "1,2", "2"] = knob("2,3", "which stages there are; 2: FedAvg",
                                                       options=("1,2,3", "2,3", "1,2", "2"))
    beta: float = knob(1.0, "weight of KL(q || p) in stage 3", ge=0)
    pretrain_steps: int = knob(100, "steps of stage 1, in four parts", ge=4)
    align_every: int = knob(1, "rounds from one stage 3 to the next", ge=1)
    align_steps: int = knob(10, "steps of a stage 3", ge=1)
    each_class: int = knob(32, "public rows of each class in stage 3, at the most", ge=1)
    tail_boost: float = knob(0.0, "share of what a class lacks that is drawn again from its rows", ge=0, le=1)
    prompt: str = knob("Text: {text}\nOne of {labels}: ", "what a model that speaks is asked")

    def __post_init__(self) -> None:
        super().__post_init__()
        need_parts("MLLMFL", "prompt", self.prompt, "text", "labels")

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'mllm_fl' and data.task = {model.task!r} do not fit together: it sets rare "
                                   "classes right; use data.task = 'classification'")

    def check_named(self, main: Any, models: Mapping[str, Any]) -> None:
        held = models.get(self.teacher)
        if "1" in self.stages and not isinstance(getattr(held, "net", None), HeadedEncoder):
            raise CompositionError(f"models.{self.teacher}: stage 1 needs its pooled states, which an encoder has; use "
                                   "method.stages = '2,3'")

    def server_asks_for(self):
        return () if self.stages == "2" else (self.teacher,)

    def public_at(self):
        return () if self.stages == "2" else ("server",)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0}

    def round(self, state: State, clients) -> Program:
        t = state["round"]
        if "1" in self.stages and t == 0:
            met = yield Ask(self.pretrain, {SERVER: pack(theta=state["theta"])})
            state = {**state, "theta": part(met[SERVER], "theta")}
        state = yield from super().round(state, clients)
        if "3" in self.stages and (t + 1) % self.align_every == 0:
            met = yield Ask(self.align, {SERVER: pack(theta=state["theta"], t=t)})
            state = {**state, "theta": part(met[SERVER], "theta")}
        return {**state, "round": t + 1}

    @on_server
    def pretrain(self, msg, client):
        theta, held = part(msg, "theta"), client.holding(self.teacher)
        self.check_named(client.model, {self.teacher: held.model})
        t = torch.from_numpy(held.measure(held.model.initial(), held.public, pooled))
        now = {**theta, **maps(client.model.net.config.hidden_size, (t.shape[1],),
                               torch_stream(client.model.seed, "mllm_fl"))}
        for a in GATES:
            now = client.fit(now, on=client.public, steps=self.pretrain_steps // len(GATES), side={"target": list(t)},
                             objective=Features((t.shape[1],), ((1 - a) ** 2,))).theta
        return pack(theta={n: now[n] for n in theta})

    @on_server
    def align(self, msg, client):
        q = self.told(client)  # [rows, C]
        y, rng = q.argmax(1), numpy_stream(client.model.seed, "mllm_fl", msg["t"])
        most = min(self.each_class, max(np.bincount(y)))
        at = [i for c in np.unique(y) for i in balanced(np.flatnonzero(y == c), most, self.tail_boost, rng)]
        rows = [replace(client.public[i], labels=int(y[i])) for i in at]
        met = client.fit(part(msg, "theta"), on=rows, steps=self.align_steps, objective=Composed(self.beta),
                         side={"target": [torch.from_numpy(q[i]) for i in at]})
        return pack(theta=met.theta, loss=met.loss)

    def told(self, client: Any) -> np.ndarray:
        """q: how likely the big model finds each class of each public row [rows, C]; of a model that speaks the class
        that it names first, at 0.9."""
        held, labels = client.holding(self.teacher), client.model.labels
        if isinstance(held.model, Model) and held.model.task == "classification":
            z = held.measure(held.model.initial(), held.public, teacher_logits)
            return torch.from_numpy(z).double().softmax(-1).numpy()
        texts = [client.model.tokenizer.decode(r.ids, skip_special_tokens=True) for r in client.public]
        said = said_by(client, self.teacher, [self.prompt.format(text=t, labels=", ".join(labels)) for t in texts], 8,
                       0.0, 0)
        at = np.array([named(s, labels) for s in said])
        if (at < 0).mean() > 0.5:
            raise Withheld(f"models.{self.teacher} names no class of {', '.join(labels)} in more than half of its "
                           f"answers, for example {said[int(np.argmax(at < 0))][:60]!r}; mend method.prompt")
        q = np.full((len(at), len(labels)), 0.1 / max(1, len(labels) - 1))
        q[np.arange(len(at)), np.where(at < 0, 0, at)] = 0.9
        return np.where(at[:, None] < 0, 1 / len(labels), q)

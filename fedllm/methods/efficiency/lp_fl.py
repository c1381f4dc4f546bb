"""LP-FL: few rows have labels; of the rest a share that grows by the round gets soft ones from the shared model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import softmax

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.verbalized import Said, Verbalized
from fedllm.methods._words import check_words, label_accuracy, one_hot, words_of


@dataclass(frozen=True)
class LPFL(Star):
    """A label is a word that the language model says; its own head scores the words, and no other is trained."""

    card = Card(
        title="LP-FL: low-parameter federated learning with soft labels",
        paper="Jiang, Liu and Fan, Low-Parameter Federated Learning with Large Language Models, WISA 2024, arXiv "
              "2307.13896",
        topic="parameter efficiency",
        sends="as FedIT: the trainables; which rows were labelled, and how, never",
        needs="task generation whose responses are `verbalizer`'s words, one token each; best a model that is right "
              "more often than by chance before it learns",
        claim=Claim("with four labelled rows of each class it is right more often than with these alone (beta 0), "
                    "where the model begins above chance", rig="prompted", metric="accuracy", baseline="lp_fl",
                    relative="difference", holds=">", threshold=0.0, against={"knobs": {"beta": 0.0}},
                    grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        also={"noise": Claim("where it begins at chance soft labels do harm: right less often than with the labelled "
                             "rows alone", rig="prompted", metric="accuracy", baseline="lp_fl", relative="difference",
                             holds="<", threshold=0.0, better="max", against={"knobs": {"beta": 0.0}},
                             options={"known": 0}, grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        evidence="From the abstract, and PET from memory. A causal model's next word takes the mask's place; PET's "
                 "auxiliary word loss is left out. `labelled` rows are each client's first ones; the others' answers "
                 "are not looked at. Over four seeds it gains 0.023 (open: too few).",
    )
    only_fits = False
    trial = Trial({"verbalizer": tuple(f"w{i}" for i in range(60)), "labelled": 2, "u0": 0.5},
                  far={"method.verbalizer": ["A", "B"], "data.fields": {"response": "letter"}})
    metrics: ClassVar = {"label_accuracy": "max"}

    verbalizer: tuple[str, ...] = knob(("positive", "negative"), "the word of each label, one token each")
    labelled: int = knob(8, "rows of each client that have a label", ge=0)
    u0: float = knob(0.1, "share of the unlabelled rows that get soft labels in round 0", ge=0, le=1)
    growth: float = knob(2.0, "by which that share grows a round, up to 1", ge=1)
    confidence_min: float = knob(0.0, "least probability of the likeliest label", ge=0, lt=1)
    temperature: float = knob(2.0, "of soft labels", gt=0)
    beta: float = knob(1.0, "what soft labels count; 0: labelled rows alone", ge=0)

    def check(self, model: Any) -> None:
        check_words(self, self.verbalizer, model)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0}

    def down(self, state: State, client):
        return pack(theta=state["theta"], round=state["round"])

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, share: number, loss?: number")
    def local(self, msg: Any, client: Client):
        theta, words = part(msg, "theta"), words_of(client, self.verbalizer)
        known, rest = client.tokens[: self.labelled], client.tokens[self.labelled :] if self.beta else []
        rows, q = list(known), [one_hot(row, words) for row in known]
        if rest:
            z = client.measure(theta, rest, Said(words)).astype(np.float64)  # the teacher: the model as it came
            at = self.accepted(z, msg["round"])
            rows, q = rows + [rest[i] for i in at], q + [softmax(z[i] / self.temperature) for i in at]
        if not rows:
            return pack(delta={n: torch.zeros_like(x) for n, x in theta.items()}, n=0, share=0.0)
        soft = [0.0] * len(known) + [self.beta] * (len(rows) - len(known))
        fitted = client.fit(theta, on=rows, objective=Verbalized(self.temperature),
                            side={"q": q, "soft": soft, "words": [torch.tensor(words)] * len(rows)})
        return pack(delta=sub(fitted.theta, theta), n=len(rows), share=(len(rows) - len(known)) / max(1, len(rest)),
                    loss=fitted.loss)

    def accepted(self, z: np.ndarray, t: int) -> list[int]:
        """Of each label that the model gives, the surest share min(1, u_0 g^t) [rows, C]."""
        p, u = softmax(z, axis=1), min(1.0, self.u0 * self.growth**min(t, 64))
        sure, said = p.max(1), p.argmax(1)
        kept: list[int] = []
        for c in range(z.shape[1]):
            mine = np.flatnonzero((said == c) & (sure >= self.confidence_min))
            kept += list(mine[np.argsort(-sure[mine], kind="stable")][: int(np.ceil(u * len(mine)))])
        return sorted(int(i) for i in kept)

    def merge(self, state: State, out: Any) -> State:
        theta = add(state["theta"], part(out.value, "delta"))
        return {"theta": theta, "round": state["round"] + 1, "share": out.value["share"]}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        theta = part(msg, "theta")
        return client.score(theta, on=msg["on"]) | label_accuracy(client, theta, msg["on"], self.verbalizer)

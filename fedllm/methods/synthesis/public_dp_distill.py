"""Public text and a public large model for a private small one: pre-train, find what is like its text, train again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.distill import Distill, Words, targets

PICK = {"rig": "matched", "kind": "level"}


@dataclass(frozen=True)
class PublicDPDistill(Star):
    """The server learns public rows (from a teacher's words too, with `mu`); `match_rounds` rounds of FedAvg make of it
    a model that leans towards private text; the public rows that it likes most more than the public model are kept, and
    learned from the start again; then FedAvg goes on.

    Privacy is the layers' matter (dp_fedavg, dp_ftrl: of whole clients). Which rows are kept follows from a model that
    they protect, so the choice costs nothing more. Clients weigh alike, as noise on the sum asks.
    """

    card = Card(
        title="Public LLMs for private cross-device FL: distillation and distribution matching",
        paper="Wang, Zhang, Cao, Li, McMahan, Oh, Xu, Zaheer, Can Public Large Language Models Help Private "
              "Cross-device Federated Learning?, Findings of NAACL 2024, arXiv 2305.12132",
        topic="transfer",
        sends="down: the model; up: its change (clip and noise by a layer)",
        needs="a language model; public rows at the server; a layer of privacy of clients; a teacher by name (models), "
              "of the same vocabulary, where mu > 0",
        claim=Claim("of public rows of which one in twenty is like the clients', at least 80 % of the twentieth that "
                    "is kept are, after rounds under dp_fedavg", metric="precision", holds=">=", threshold=0.8,
                    options={"noise": 0.3}, **PICK),
        also={"quiet": Claim("and without noise at least 90 %", metric="precision", holds=">=", threshold=0.9, **PICK),
              "matched": Claim("pre-trained again on what was kept, the loss on clients' text after the rounds is "
                               "lower than pre-trained on all public rows, at the same epsilon", metric="loss",
                               baseline="public_dp_distill", relative="difference", holds="<", threshold=0.0,
                               options={"noise": 0.3}, against={"knobs": {"keep": 1.0}}, rig="matched",
                               grid={"local.lr": (3e-3, 1e-2)}),
              "ratio": Claim("the difference of the two likelihoods chooses no worse than the private model's alone",
                             metric="over_alone", holds=">=", threshold=0.0, **PICK)},
        evidence="Abstract read, and a dossier. The tokenizer is the recipe's, so public. Both phases under one layer: "
                 "its accountant composes them.",
    )
    trial = Trial({"public_steps": 2, "match_rounds": 1, "keep": 0.5})
    only_fits = True
    public_steps: int = knob(200, "steps of the server on public rows, each time", ge=1)
    match_rounds: int = knob(5, "rounds before public rows are chosen; 0: none, all are kept", ge=0)
    keep: float = knob(0.1, "share of public rows that is kept; 1: all", gt=0, le=1)
    mu: float = knob(0.0, "share of the teacher's words in what the server learns", ge=0, le=1)
    teacher: str = knob("", "name of the recipe's model that teaches, where mu > 0")
    temperature: float = knob(1.0, "of the teacher's words", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.teacher) != bool(self.mu):
            raise CompositionError(f"method 'public_dp_distill' with teacher = {self.teacher!r} and mu = {self.mu:g}: "
                                   "a teacher needs mu > 0, and mu > 0 a teacher; give both or none")

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError(f"method 'public_dp_distill' learns text and data.task is {model.task!r}, so they "
                                   "do not fit together; data.task = 'generation' works")

    def asks_for(self) -> Sequence[str]:
        return (self.teacher,) if self.teacher else ()

    def public_at(self):
        return ("server",)

    def init(self, model: Any) -> State:
        theta = model.initial()
        return {"theta": theta, "first": theta, "public": theta, "round": 0, "kept": []}

    def round(self, state: State, clients: Any) -> Program:
        t = state["round"]
        if t == 0:
            state = yield from self.learned(state, [])
        if t == self.match_rounds and t and self.keep < 1:
            out = yield Ask(self.liked, {SERVER: pack(mine=state["theta"], theirs=state["public"])})
            state = yield from self.learned(state, out[SERVER]["kept"])
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        return {**state, "theta": add(state["theta"], part(out.value, "delta")), "round": t + 1}

    def learned(self, state: State, kept: Sequence[int]) -> Program:
        """From the first weights on, on all public rows or those kept."""
        out = yield Ask(self.taught, {SERVER: pack(theta=state["first"], kept=list(kept))})
        theta = part(out[SERVER], "theta")
        return {**state, "theta": theta, "public": theta if not kept else state["public"], "kept": list(kept)}

    @on_server
    def taught(self, msg: Payload, client: Any) -> Payload:
        if not client.public:
            raise DataError("method 'public_dp_distill' learns public rows and the data has none; give data.public")
        rows = [client.public[i] for i in msg["kept"]] or list(client.public)
        how: dict[str, Any] = {}
        if self.mu:  # mu KL(teacher || student) + (1 - mu) CE
            teacher = client.holding(self.teacher)
            theirs = [teacher.public[i] for i in msg["kept"]] or list(teacher.public)
            longest = max(targets(r) for r in theirs)
            said = teacher.measure({}, theirs, Words(longest))  # [rows, longest * V]
            side = [torch.from_numpy(s).reshape(longest, -1)[: targets(r)] for s, r in zip(said, theirs, strict=True)]
            how = {"objective": Distill(self.temperature, ce=1 - self.mu), "side": {"teacher": side}}
        fitted = client.fit(part(msg, "theta"), on=rows, steps=self.public_steps, **how)
        return pack(theta=fitted.theta, loss=fitted.loss)

    @on_server
    def liked(self, msg: Payload, client: Any) -> Payload:
        """s(x) = (log p_private(x) - log p_public(x)) / |x|, the largest first."""
        mine, theirs = client.probe([part(msg, "mine"), part(msg, "theirs")], on=client.public)
        score = (theirs.total - mine.total) / np.maximum(1, mine.count)
        best = np.argsort(-score, kind="stable")[: max(1, round(self.keep * len(score)))]
        return {"kept": sorted(int(i) for i in best)}

    @on_client(reduce=Mean(by="uniform"), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        w = part(msg, "theta")
        fitted = client.fit(w)
        return pack(delta=sub(fitted.theta, w), n=client.n, loss=fitted.loss)

    def report(self, state: State) -> Mapping[str, Any] | None:
        return {"kept": len(state["kept"])} if state["kept"] else None

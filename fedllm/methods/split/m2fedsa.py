"""M2FedSA: each modality's encoder split between its client and a server that joins the modalities and teaches both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, QuorumError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part, scale, sub
from fedllm.core.reduce import Mean
from fedllm.methods import _towers as two
from fedllm.methods._plain_sgd import steps_together
from fedllm.models.fusion import Taught
from fedllm.models.towers import towers
from fedllm.spaces.split_adapter import SplitAdapter


@dataclass(frozen=True)
class M2FedSA(Method):
    """e = front_m(x) up, f = rest_m(e) down with what the fusion says of both, dL/df up, dL/de down; SGD everywhere."""

    card = Card(
        title="M2FedSA: split and modality adapters",
        paper="Zhang et al., Enhancing Storage and Computational Efficiency in Federated Multimodal Learning for "
              "Large-Scale Models, ICML 2024",
        topic="heterogeneity",
        sends="in every step, of each modality, up: states behind the front and dL/df; down: features, what the fusion "
              "says, and dL/d(states); once a round fronts' adapters and heads either way. Never pixels, ids or labels",
        needs="data.task: image_text with a text in each row, a CLIP, space split_adapter, plain SGD",
        claim=Claim("one step of all clients is one step of the unsplit model along the mean of their gradients "
                    "(largest relative difference of the adapters after 2 rounds)", rig="two_views",
                    metric="off_unsplit", holds="<=", threshold=1e-5, kind="exact", options={"whole": True}),
        also={"feedback": Claim("where pictures are noisy, what the fusion knows of the texts makes the picture's own "
                                "head right more often than without feedback", rig="two_views",
                                metric="image_accuracy", baseline="m2fedsa", relative="difference", holds=">",
                                threshold=0.0, against={"knobs": {"feedback": 0.0, "align": 0.0}},
                                grid={"local.lr": (0.03, 0.1)})},
        evidence="The authors' repository by a dossier. A user's two devices are one client here. Losses are of hard "
                 "labels; since those stay at home, the client also sends dL/d(fused logits). No dropout.",
    )
    trial, only_fits = Trial({"steps": 2, "hidden": 8, "heads": 2}, {"name": "split_adapter", "size": 4},
                             task="image_text", far={"local.optimizer": "sgd"}), False
    metrics: ClassVar = {"image_accuracy": "max", "text_accuracy": "max"}

    steps: int = knob(4, "steps of a round", ge=1)
    hidden: int = knob(64, "width of the fusion and of the heads", ge=1)
    heads: int = knob(8, "attention heads of the fusion; they divide `hidden`", ge=1)
    fusion_lr: float = knob(0.1, "learning rate of the fusion", gt=0)
    own: float = knob(0.6, "weight of a modality's own loss once the fusion is fixed", ge=0)
    feedback: float = knob(0.2, "weight of the distance to what the fusion says", ge=0)
    align: float = knob(0.2, "weight of the distance to the fusion's features", ge=0)
    fuse_window: int = knob(10, "rounds over which the fusion's progress is looked at", ge=3)
    fuse_below: float = knob(0.3, "variation of that progress below which the fusion is fixed and taught from", gt=0)

    @property
    def repeats(self) -> int:
        return self.steps

    def check(self, model: Any) -> None:
        if not isinstance(model.space, SplitAdapter):
            raise CompositionError(f"method 'm2fedsa' and space '{model.space.stem}' do not fit together: it trains "
                                   "adapters on both sides of a cut; use space = 'split_adapter'")
        if self.hidden % self.heads:
            raise CompositionError(f"method.heads = {self.heads} does not divide method.hidden = {self.hidden}")
        towers(model, model.space.cut)

    def fusion(self, model: Any) -> Any:
        return two.fusion_of(model, self.hidden, self.heads)

    check_work = steps_together("m2fedsa")

    def init(self, model: Any) -> State:
        self.check(model)
        return {**two.started(model, self.fusion(model), self.hidden), "losses": [], "fused": False}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return {**state["ends"], **state["tasks"], **{f"fusion.{n}": t for n, t in state["fusion"].items()}}, None

    def round(self, state: State, clients: Any) -> Program:
        tasks, fusion, fused, said = state["tasks"], state["fusion"], state["fused"], []
        turn = yield Ask(self.begin, {c.id: pack(ends=state["ends"]) for c in clients})
        for t in range(self.steps):
            told = pack(tasks=tasks, fusion=fusion, of=two.under(turn), ids=list(turn))
            [up] = (yield Ask(self.through, {SERVER: told}, quorum=1)).values()
            tops = yield Ask(self.top, {c: {**part(up, c), "fixed": fused} for c in turn})
            if not tops.answered:
                raise QuorumError(f"m2fedsa: no client answered in step {t + 1} of {self.steps}")
            said += [reply["loss"] for reply in tops.values()]
            told = pack(tasks=tasks, fusion=fusion, of=two.under(tops), ids=list(tops), fixed=fused)
            [down] = (yield Ask(self.learn, {SERVER: told}, quorum=1)).values()
            tasks, fusion = part(down, "tasks"), part(down, "fusion")
            turn = yield Ask(self.turn, {c: {**part(down, f"g/{c}"), "stop": t + 1 == self.steps} for c in tops})
        out = yield Ask(self.hand_in, {c: {} for c in turn})
        losses = [*state["losses"], float(np.mean(said))][-self.fuse_window - 1 :]
        return {"ends": part(out.value, "ends"), "tasks": two.shared(tasks), "fusion": fusion, "losses": losses,
                "fused": fused or two.settled(losses, self.fuse_window, self.fuse_below)}

    @on_client(gives="image: tensor, text: tensor, mask: mask", fits=two.fit_states)
    def begin(self, msg: Any, client: Any) -> Payload:
        self.check_work(client.training, 0)
        client.session["ends"], client.session["plan"] = part(msg, "ends"), client.batches(self.steps)
        return two.ahead(client)

    @on_server
    def through(self, msg: Any, client: Any) -> Payload:
        return two.under(two.joined(client, part(msg, "tasks"), part(msg, "fusion"), self.fusion(client.model),
                            two.each(msg, "of", msg["ids"])))

    @on_client(gives="image: tensor, text: tensor, z: tensor, loss: number", fits=two.fit_slopes)
    def top(self, msg: Any, client: Any) -> Payload:
        return two.taught(client, msg, Taught(self.own, self.feedback, self.align) if msg["fixed"] else None)

    @on_server
    def learn(self, msg: Any, client: Any) -> Payload:
        """tasks <- tasks - lr mean_k g_k, the same of the fusion until it is fixed, and dL_k/de_k for each client."""
        tasks, fusion = part(msg, "tasks"), part(msg, "fusion")
        g, also, down = two.slopes(client, tasks, fusion, self.fusion(client.model), two.each(msg, "of", msg["ids"]))
        rate = 0.0 if msg["fixed"] else self.fusion_lr
        return pack(tasks=sub(tasks, scale(g, client.training.lr)), fusion=sub(fusion, scale(also, rate)), g=down)

    @on_client(gives="done?: count, image?: tensor, text?: tensor, mask?: mask", fits=two.fit_states)
    def turn(self, msg: Any, client: Any) -> Payload:
        """ends <- ends - lr dL/d front, and the next batch."""
        two.back(client, msg)
        return {"done": 1} if msg["stop"] else two.ahead(client)

    @on_client(reduce=Mean("uniform"), gives="ends: tensors")
    def hand_in(self, msg: Any, client: Any) -> Payload:
        return pack(ends=client.session["ends"])

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        seen = yield Ask(self.shown, {c.id: pack(ends=state["ends"], on=on) for c in clients})
        some = {c: dict(seen[c]) for c in seen if "mask" in seen[c]}
        told = pack(tasks=state["tasks"], fusion=state["fusion"], of=two.under(some), ids=list(some))
        [up] = (yield Ask(self.through, {SERVER: told}, quorum=1)).values()
        return (yield Ask(self.score, {c: {**part(up, c), **pack(ends=state["ends"], on=on)} for c in seen}))

    @on_client(gives="image?: tensor, text?: tensor, mask?: mask", test=True)
    def shown(self, msg: Any, client: Any) -> Payload:
        rows = client.encode(client.held_out(msg["on"]))
        return two.states(client, part(msg, "ends"), rows) if len(rows) else {}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Any, client: Any) -> Payload:
        return two.figures(client, msg)

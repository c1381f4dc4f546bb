"""Consensus graph: of one thing each client holds a part, and the server makes one answer of what all say of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.core.rng import numpy_stream
from fedllm.methods._consensus import Consensus, stepped
from fedllm.methods._owners import Owned, drawn, seen

ANCHORS = 128
"""Things by which neurons are matched."""
RIG = {"rig": "parts", "metric": "accuracy", "baseline": "consensus_graph", "relative": "difference", "holds": ">"}
TWO, GIVEN = {"coupled": True, "train": 512, "rounds": 2}, {"graph": "given", "steps": 100, "lr": 0.03}


@dataclass(frozen=True)
class ConsensusGraph(Owned):
    """h_k = f_k(x_k) at each owner; the server aligns all h_k, passes them over a graph of owners, and pools them."""

    card = Card(
        title="Consensus graph: one answer from all owners' parts",
        paper="Ma, Hoang, Chen, Federated Inference through Aligning Local Representations and Learning a Consensus "
              "Graph, 2021/2022",
        topic="inference: vertical",
        sends="up: d numbers (`space.size`) of each owner and thing; in training also, from who holds the labels, "
              "dL/d(logits), FROM WHICH LABELS CAN BE READ, and down to it the logits; with `encoders: trained` down "
              "to each owner dL/dh. Ids as hashes, which whoever knows an id can make too",
        needs="data.task classification, space mlp_head; rows with an `id` (data.entity) that owners share; all owners "
              "in each round, and the labels of one",
        claim=Claim("with encoders that owners trained apart, aligned representations are right at least 3 points more "
                    "often than their plain mean", threshold=0.03, against={"knobs": {"align": "none"}}, **RIG),
        also={"single": Claim("and at least 8 points more often than the best owner by its own part", rig="parts",
                              metric="over_best", holds=">=", threshold=0.08),
              "graph": Claim("where the class is whether two owners agree, the true graph is right at least 5 points "
                             "more often than none", threshold=0.05, options={**TWO, "knobs": GIVEN},
                             against={**TWO, "knobs": {**GIVEN, "graph": "none"}}, **RIG),
              "learned": Claim("and so is a learned one", threshold=0.05, options={
                  **TWO, "knobs": {**GIVEN, "graph": "learned"}}, against={**TWO, "knobs": {**GIVEN, "graph": "none"}},
                  **RIG),
              "lost": Claim("where a part is missing that a joined owner reads nearly the same, a learned graph is "
                            "right more often than none", threshold=0.0, options={"lost": 1, "knobs": {"hide": 0.2}},
                            against={"lost": 1, "knobs": {"hide": 0.2, "graph": "none"}}, **RIG),
              "joint": Claim("encoders trained through the answer need no alignment: their plain mean is at most 2 "
                             "points behind", threshold=-0.02,
                             options={"knobs": {"align": "none", "encoders": "trained", "own_rounds": 0}},
                             against={"knobs": {"encoders": "trained", "own_rounds": 0}}, **RIG),
              "neurons": Claim("an owner's neurons in another order, and its map with them, change no logit",
                               rig="parts", metric="permuted", holds="<=", threshold=1e-5, kind="exact"),
              "numbers": Claim("of a thing only d numbers cross from an owner", rig="parts", metric="numbers_beside",
                               holds="<=", threshold=0.0, kind="exact")},
        evidence="From the abstract by a dossier, which reconstructed the rest. An owner's encoder is a hidden layer, "
                 "drawn by itself, on frozen features of whatever model it holds. That a learned graph pays is open.",
    )
    trial = Trial({"steps": 2, "batch": 3, "own_rounds": 1, "encoders": "trained"}, {"name": "mlp_head", "size": 8},
                  task="classification", far={"data.entity": "id", "data.test": 0.0}, silent="a silent owner's part is "
                  "missing, and the sum another", rounding="Adam at the server divides by a gradient's own size")
    lr: float = knob(0.01, "rate of the server's Adam", gt=0)
    align: Literal["linear", "none", "hungarian", "sinkhorn"] = knob(
        "linear", "A_k: learned, none, a matching of neurons, or a soft one that is learned",
        options=("linear", "none", "hungarian", "sinkhorn"))
    graph: Literal["learned", "given", "none"] = knob("learned", "who hears whom", options=("learned", "given", "none"))
    edges: tuple[str, ...] = knob((), "of the given graph, each 'CLIENT CLIENT'")
    layers: int = knob(1, "of the graph", ge=0, le=4)
    missing_owner: Literal["drop", "zero", "mean"] = knob(
        "drop", "an owner without a part: no node, zeros, or the others' mean", options=("drop", "zero", "mean"))
    hide: float = knob(0.0, "share of parts that are hidden in training, so that missing ones are known", ge=0, lt=1)

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        super().check_clients(ids, cohort)
        if (self.graph == "given") != bool(self.edges):
            raise RecipeError(f"method.edges = {list(self.edges)}: allowed are edges with graph 'given', which needs "
                              f"some, and the graph is '{self.graph}'")
        if odd := [e for e in self.edges if len(set(e.split())) != 2 or not set(e.split()) <= set(ids)]:
            raise RecipeError(f"method.edges: {odd[0]!r} is not two clients; allowed are {', '.join(ids)}")

    def init(self, model: Any) -> State:
        self.check(model)
        like = torch.zeros(1, dtype=torch.promote_types(model.net.dtype, torch.float32))
        return {"round": 0, "seed": model.seed, "owners": [], "ids": [], "holder": "", "net": {}, "adam": {},
                "d": model.space.size, "classes": len(model.labels), "like": like}

    def wiring(self, owners: Sequence[str]) -> Consensus:
        return Consensus(tuple(owners), self.align, self.graph, self.layers, self.missing_owner,
                         frozenset(frozenset(e.split()) for e in self.edges))

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        state = yield from self.begun(state, clients)
        if state["round"] < self.own_rounds:
            return state
        how, holder = self.wiring(state["owners"]), state["holder"]
        rng = numpy_stream(state["seed"], "owners", state["round"])
        net, batches = state["net"], drawn(state["ids"], self.steps, self.batch, rng)
        if not net:
            net = how.start(state["d"], state["classes"], state["seed"], state["like"].dtype)
            if how.matches:
                ids = state["ids"][:ANCHORS]
                told = self.vectors(state, (yield self.asked(state, clients, ids)), len(ids))
                net = how.matched(net, told["h"], told["has"], how.owners.index(holder))
        state = {**state, "net": net}
        for t, ids in enumerate(batches):
            up = yield self.asked(state, clients, ids)
            hidden = torch.from_numpy(rng.random((len(how.owners), len(ids))) < self.hide)
            told = self.vectors(state, up, len(ids), hidden)
            [said] = (yield Ask(self.fuse, {SERVER: told}, quorum=1)).values()
            top = yield Ask(self.judge, {holder: {"z": said["z"], "ids": ids}})
            if holder not in top:
                raise QuorumError(f"client '{holder}' holds the labels, and did not answer in step {t + 1}")
            g = {**told, "g": top[holder]["g"], **pack(adam=state["adam"])}
            [down] = (yield Ask(self.learn, {SERVER: g}, quorum=1)).values()
            state = {**state, "net": part(down, "net"), "adam": part(down, "adam")}
            if self.encoders == "trained":  # dL/dh_k to each owner, in the same step
                yield Ask(self.turn, {c: {"g": down["g"][how.owners.index(c)]} for c in up})
        return state

    def vectors(self, state: State, up: Any, count: int, hidden: Any = None) -> Payload:
        """What the server works on: the net, and h_k of all owners as far as they have parts."""
        got = seen(up, state["owners"], (count, state["d"]), state["like"])
        has = got["has"] if hidden is None else got["has"] & ~hidden
        return {**pack(net=state["net"]), "h": got["h"], "has": has, "owners": list(state["owners"])}

    def joined(self, state: State, up: Any, count: int) -> Program:
        return next(iter((yield Ask(self.fuse, {SERVER: self.vectors(state, up, count)}, quorum=1)).values()))

    @on_server
    def fuse(self, msg: Payload, client: Client) -> Payload:
        """logits = mean_k z_k H + b, z_k = A_k h_k + relu(sum_j S_kj A_j h_j W)"""
        how = self.wiring(msg["owners"])
        client.book(tokens=0, steps=0, flops=how.operations(msg["h"]))
        z = how.logits(part(msg, "net"), msg["h"], msg["has"])
        p, best = z.softmax(-1).max(-1)
        return {"z": z, "said": [str(client.model.labels[int(i)]) for i in best], "sure": p.tolist()}

    @on_server
    def learn(self, msg: Payload, client: Client) -> Payload:
        """The net's step of Adam, and dL/dh_k [n, B, d] for the owners."""
        how, net = self.wiring(msg["owners"]), part(msg, "net")
        client.book(tokens=0, steps=0, flops=2 * how.operations(msg["h"]))
        slopes, g = how.slopes(net, msg["h"], msg["has"], msg["g"])
        net, adam = stepped(net, slopes, part(msg, "adam"), self.lr)
        return pack(net=net, adam=adam, g=g)

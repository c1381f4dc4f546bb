"""Federated foundation models: a few steps on public rows at the server, then a round on private ones, in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import add, pack, part, sub, zeros_like
from fedllm.core.reduce import Mean

SPACE = {"space": {"name": "full"}, "rounds": 8}
LR = {"local.lr": (5e-4, 1e-3, 2e-3)}


@dataclass(frozen=True)
class FFMLifecycle(Star):
    """Each round: `central_steps` of the server on `data.public`, then FedAvg; a server at rest is skipped.

    It is the first of the stages that a recipe goes through (`stages`): tune, apply and grow begin with its product.
    """

    card = Card(
        title="FFM: the life of a federated foundation model, pre-training",
        paper="Yu, Munoz and Jannesari, Federated Foundation Models: Privacy-Preserving and Collaborative Learning for "
              "Large Models, LREC-COLING 2024, arXiv 2305.11414",
        topic="pre-training",
        sends="as FedAvg; public rows are the server's",
        needs="any model and space; public rows at the server",
        claim=Claim("taking turns ends with a lower loss on the clients' rows than as many steps on public rows alone",
                    rig="two_domains", metric="private_loss", baseline="ffm_lifecycle", relative="difference",
                    holds="<", threshold=0.0, options=SPACE, against={"knobs": {"learn": "public"}}, grid=LR),
        also={"public": Claim("and with a lower loss on public rows than as many steps on the clients' alone",
                              rig="two_domains", metric="public_loss", baseline="ffm_lifecycle", relative="difference",
                              holds="<", threshold=0.0, options=SPACE, against={"knobs": {"learn": "private"}},
                              grid=LR)},
        evidence="A position paper: no algorithm but the order of stages. Arms have equal steps: who learns from one "
                 "side alone takes the other side's steps there. The server's optimizer begins afresh each round.",
    )
    central_steps: int = knob(10, "c: steps of the server on public rows before each round", ge=0)
    learn: Literal["both", "public", "private"] = knob("both", "whose rows; of one side alone all steps are there",
                                                       options=("both", "public", "private"))
    patience: int = knob(0, "rounds without a lower public loss after which the server's steps end; 0: they never do",
                         ge=0)

    def public_at(self):
        return ("server",) if self.learn != "private" else ()

    def init(self, model: Any) -> State:
        return {**super().init(model), "best": None, "waited": 0}

    def round(self, state: State, clients) -> Program:
        rested = bool(self.patience) and state["waited"] >= self.patience
        if self.learn != "private" and not rested:
            # all steps of the round where there are no private ones; a client's steps follow from its rows
            told = yield Ask(self.teach, {SERVER: pack(theta=state["theta"], rows=[c.n for c in clients])})
            loss, best = float(told[SERVER]["loss"]), state["best"]
            better = best is None or loss < best
            state = {**state, "theta": add(state["theta"], part(told[SERVER], "delta")),
                     "best": loss if better else best, "waited": 0 if better else state["waited"] + 1}
        if self.learn == "public":
            return state
        return (yield from super().round(state, clients))

    @on_server
    def teach(self, msg, client):
        theta, steps = part(msg, "theta"), self.central_steps
        if self.learn == "public":
            steps += max(client.training.count(n) for n in msg["rows"])
        if not steps:
            return pack(delta=zeros_like(theta), loss=client.probe([theta], on=client.public)[0].mean)
        fitted = client.fit(theta, on=client.public, steps=steps)
        return pack(delta=sub(fitted.theta, theta), loss=fitted.loss)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        more = self.central_steps if self.learn == "private" else 0
        fitted = client.fit(theta, steps=client.training.count(client.n) + more) if more else client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def report(self, state: State):
        return {"public_loss": state["best"], "rounds_without_a_lower_one": state["waited"]}

"""FedBuff: the server waits for K answers, whoever gives them, and starts a client the moment another has answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.methods._late import REAL, Late, begin, booked, crowded, refuse_rounds, staleness, starters

FLEET: Mapping[str, Any] = {"concurrency": 10}
STEPS = {"knobs.server_lr": (0.3, 1.0, 3.0, 6.0, 10.0)}
FARTHER = {"knobs.server_lr": (*STEPS["knobs.server_lr"], 20.0)}
TIMED = "what is measured is the time to a target, and each works until it is there"


@dataclass(frozen=True)
class FedBuff(Method):
    """Buffered asynchronous aggregation: `concurrency` clients at work, one server step after every `buffer_size`
    answers. A round of the recipe is one server step; give the method all clients (`clients.per_round: 1.0`)."""

    by_arrival = True
    card = Card(
        title="FedBuff: buffered asynchronous aggregation",
        paper="Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, AISTATS 2022, "
              "arXiv 2106.06639",
        topic="time", sends="down: the trainables and their version; up: the change, that version, n, the loss",
        needs="any model and space; layers that need no whole round (no secure aggregation, no central DP)",
        claim=Claim("with log-normal speeds (sigma 1) and 10 clients at work, K = 3 reaches the target in at most 0.4 "
                    "of synchronous FedAvg's virtual time, each at its best server rate", rig="asynchrony",
                    metric="seconds", baseline="fedavg", relative="ratio", holds="<=", threshold=0.4,
                    options={"knobs": {"buffer_size": 3, **FLEET}}, grid=FARTHER, unequal=TIMED),
        also={"discount": Claim("with the paper's discount (a = 0.5) it takes less virtual time than without, each at "
                                "its best server rate", rig="asynchrony", metric="seconds", baseline="fedbuff",
                                relative="ratio", holds="<", threshold=1.0, grid=STEPS, unequal=TIMED,
                                options={"knobs": {"buffer_size": 3, **FLEET}},
                                against={"knobs": {"buffer_size": 3, "a": 0.0, **FLEET}})},
        evidence="FLSim's code read; it sums a buffer where this is a mean (K is then in its server rate), and divides "
                 "an answer's weight by the weight of the mean staleness, which is left out here. The discount is a "
                 "knob, not a law: the default is the paper's, and claim `fedbuff:discount` says what it does here. "
                 f"{REAL}",
    )
    trial = Trial({"buffer_size": 3, "concurrency": 4},
                  far={"rounds": 3, "method.buffer_size": 2, "method.concurrency": 1})
    buffer_size: int = knob(10, "K, answers to one server step", ge=1)
    concurrency: int = knob(10, "C, clients at work at a time", ge=1)
    a: float = knob(0.5, "discount of an answer that is s versions old: (1 + s)^-a; 0: none", ge=0, le=1)
    max_staleness: int | None = knob(None, "answers older than so many versions are dropped; None: never", ge=0)
    server_lr: float = knob(1.0, "eta_g, the server's step along the mean change", gt=0)
    weighting: Literal["uniform", "n"] = knob("uniform", "answers weigh alike, or by their examples",
                                              options=("uniform", "n"))
    seed: int = knob(0, "of the order in which clients begin", ge=0)

    def cautions(self, clients):
        return crowded(self.concurrency, clients, self.buffer_size)

    def check_layers(self, layers):
        refuse_rounds(self, layers)

    def init(self, model) -> State:
        return begin(model.initial())

    def round(self, state, clients) -> Program:
        v, k = state["version"], self.buffer_size
        msgs = {c.id: pack(theta=state["theta"], version=v) for c in starters(clients, self.seed, v)}
        out = yield Ask(self.local, msgs, reduce=Late(v, self.a, self.max_staleness), quorum=k, enough=k,
                        flight=self.concurrency)
        # w <- w + eta_g (1/K) sum_k w(s_k) D_k
        theta = add(state["theta"], part(out.value, "delta"), self.server_lr)
        return {**state, "theta": theta, "version": v + 1, **booked(state, out)}

    @on_client(gives="delta: tree, version: count, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        n = client.n if self.weighting == "n" else 1
        return pack(delta=sub(fitted.theta, theta), version=msg["version"], n=n, loss=fitted.loss)

    def report(self, state):
        return staleness(state)

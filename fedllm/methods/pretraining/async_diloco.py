"""Asynchronous DiLoCo: each worker's change moves the model as it comes, and momentum waits for a round of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, scale, sub, zeros_like
from fedllm.methods._late import REAL, Late, begin, booked, crowded, refuse_rounds, staleness, starters

FLEET: Mapping[str, Any] = {"knobs": {"concurrency": 4}, "lr": 3e-3}
STEPS = {"knobs.outer_lr": (0.2, 0.4, 0.7, 1.0)}
TIMED = "what is measured is the time to a loss, and each works until it is there"


@dataclass(frozen=True)
class AsyncDiLoCo(Method):
    """Delayed Nesterov with dynamic local updates: a round of the recipe is one worker's answer.

    acc <- acc + Delta. Of every N-th answer the momentum takes all of them, m <- mu m + acc / N, and the model moves by
    mu m + Delta / N; in between it moves by Delta / N alone. A slow worker makes fewer steps in the same time.
    """

    by_arrival = True
    card = Card(
        title="Asynchronous Local-SGD with delayed Nesterov momentum",
        paper="Liu et al., Asynchronous Local-SGD Training for Language Modeling, 2024, arXiv 2401.09135",
        topic="pre-training",
        sends="down: the trainables, their version, how many steps to make; up: their change, that version, the "
              "training loss",
        needs="any model and space; local.steps H of the quickest; workers that declare their speed; layers that need "
              "no whole round (no secure aggregation, no central DP)",
        claim=Claim("on workers of speeds 1, 1, 2 and 4 it reaches the loss in at most 1 / 1.3 of synchronous DiLoCo's "
                    "virtual time, each at its best outer rate", rig="workers", metric="seconds", baseline="diloco",
                    relative="ratio", holds="<=", threshold=1 / 1.3, options=FLEET, grid=STEPS, unequal=TIMED),
        also={"delayed": Claim("after the same time, momentum that waits ends no higher than Nesterov momentum in "
                               "each answer, each at its best outer rate", rig="workers", metric="fall",
                               baseline="async_diloco", relative="difference", holds=">=", threshold=0.0, options=FLEET,
                               against={"knobs": {"concurrency": 4, "delay": 1}}, grid=STEPS)},
        evidence="DeepMind's toy notebook from a dossier: N is the number of workers, and without 1 / N the rate would "
                 f"be N times as large. {REAL}",
    )
    trial = Trial({"concurrency": 3, "delay": 2}, local={"optimizer": "adamw", "lr": 0.01, "steps": 2},
                  far={"rounds": 3, "method.concurrency": 1})
    outer_lr: float = knob(0.7, "the server's rate", gt=0)
    outer_momentum: float = knob(0.9, "mu, of the server's Nesterov momentum", ge=0, lt=1)
    delay: int | None = knob(None, "N, answers from one step of the momentum to the next; None: as many as "
                                   "concurrency; 1: ordinary Nesterov in each answer", ge=1)
    concurrency: int = knob(4, "workers at work at a time", ge=1)
    dynamic: bool = knob(True, "a worker makes local.steps times its speed over the quickest one's; false: all alike")
    max_staleness: int | None = knob(None, "answers older than so many versions are dropped; None: never", ge=0)
    seed: int = knob(0, "of the order in which workers begin", ge=0)

    def cautions(self, clients):
        return crowded(self.concurrency, clients)

    def check_layers(self, layers):
        refuse_rounds(self, layers)

    def init(self, model) -> State:
        theta = model.initial()
        return {**begin(theta), "m": zeros_like(theta), "acc": zeros_like(theta)}

    def round(self, state, clients) -> Program:
        v, n = state["version"], self.delay or self.concurrency
        quickest = max(c.profile.speed for c in clients)
        msgs = {c.id: pack(theta=state["theta"], version=v, share=c.profile.speed / quickest if self.dynamic else 1.0)
                for c in starters(clients, self.seed, v)}
        out = yield Ask(self.local, msgs, reduce=Late(v, 0.0, self.max_staleness), enough=1, flight=self.concurrency)
        g, m, mu = part(out.value, "delta"), state["m"], self.outer_momentum
        acc, step = add(state["acc"], g), scale(g, 1 / n)
        if not (v + 1) % n:
            m = add(scale(m, mu), acc, 1 / n)  # m <- mu m + acc / N
            acc, step = zeros_like(acc), add(step, m, mu)  # mu m + Delta / N
        return {**state, "theta": add(state["theta"], step, -self.outer_lr), "m": m, "acc": acc, "version": v + 1,
                **booked(state, out)}

    @on_client(gives="delta: tree, version: count, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        steps = max(1, round(client.training.count(client.n) * msg["share"]))  # H_k = H v_k / max v
        fitted = client.fit(theta, steps=steps, moments=client.memory.get("inner"))
        client.memory["inner"] = fitted.moments
        return pack(delta=sub(theta, fitted.theta), version=msg["version"], n=1, loss=fitted.loss)

    def report(self, state):
        return staleness(state)

"""FedAsync: every answer moves the model at once, the less the older the model that it began from."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import pack, part, tree_map
from fedllm.local.terms import Proximal
from fedllm.methods._late import REAL, Late, begin, booked, crowded, refuse_rounds, staleness, starters


@dataclass(frozen=True)
class FedAsync(Method):
    """Asynchronous federated optimization: `concurrency` clients at work, one server step after each answer, which is
    one round of the recipe; give the method all clients (`clients.per_round: 1.0`)."""

    by_arrival = True
    card = Card(
        title="FedAsync: asynchronous federated optimization",
        paper="Xie, Koyejo and Gupta, Asynchronous Federated Optimization, 2019, arXiv 1903.03934",
        topic="time", sends="down: the trainables and their version; up: what they became, that version, n, the loss",
        needs="any model and space; layers that need no whole round (no secure aggregation, no central DP)",
        claim=Claim("with log-normal speeds (sigma 1) and 10 clients at work, it reaches the target in less virtual "
                    "time than synchronous FedAvg, each at its best server rate (alpha)", rig="asynchrony",
                    metric="seconds", baseline="fedavg", relative="ratio", holds="<", threshold=1.0,
                    options={"knobs": {"concurrency": 10}},
                    grid={"knobs.alpha": (0.1, 0.3, 0.6, 0.9), "knobs.server_lr": (0.3, 1.0, 3.0, 6.0, 10.0)},
                    unequal="what is measured is the time to a target, and each works until it is there"),
        evidence="alpha_s = alpha (1 + s)^-a, the paper's polynomial form. FedBuff's paper sees this one 2.5 times "
                 "slower than FedBuff. Against a FedAvg whose server rate is tuned too it takes 3.1 times as long: "
                 f"the claim fails. {REAL}",
    )
    trial = Trial({"concurrency": 3}, far={"method.concurrency": 1})
    alpha: float = knob(0.3, "share of the answer in the new model, at staleness 0", gt=0, le=1)
    concurrency: int = knob(10, "clients at work at a time", ge=1)
    a: float = knob(0.5, "discount of an answer that is s versions old: (1 + s)^-a; 0: none", ge=0, le=1)
    rho: float = knob(0.005, "weight of the local term rho/2 ||x - x_t||^2, x_t where the client began; 0: none", ge=0)
    max_staleness: int | None = knob(None, "answers older than so many versions are dropped; None: never", ge=0)
    seed: int = knob(0, "of the order in which clients begin", ge=0)

    def cautions(self, clients):
        return crowded(self.concurrency, clients)

    def check_layers(self, layers):
        refuse_rounds(self, layers)

    def init(self, model) -> State:
        return begin(model.initial())

    def round(self, state, clients) -> Program:
        v = state["version"]
        msgs = {c.id: pack(theta=state["theta"], version=v) for c in starters(clients, self.seed, v)}
        out = yield Ask(self.local, msgs, reduce=Late(v, self.a, self.max_staleness), enough=1,
                        flight=self.concurrency)
        w, theirs = self.alpha * out.value["weight"], part(out.value, "theta")  # theirs = (1 + s)^-a w_k
        # w <- (1 - alpha_s) w + alpha_s w_k
        theta = tree_map(lambda x, y: ((1 - w) * x + self.alpha * y).to(x.dtype), state["theta"], theirs)
        return {**state, "theta": theta, "version": v + 1, **booked(state, out)}

    @on_client(gives="theta: tree, version: count, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        # min_x F_k(x) + rho/2 ||x - x_t||^2
        fitted = client.fit(theta, terms=[Proximal(self.rho, theta)] if self.rho else [])
        return pack(theta=fitted.theta, version=msg["version"], n=1, loss=fitted.loss)

    def report(self, state):
        return staleness(state)

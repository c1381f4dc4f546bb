"""Stragglers: ask more clients than are needed, close in time, take partial work, and average it without a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import Withheld
from fedllm.core.method import Card, Claim, Method, Trial, knob
from fedllm.core.payload import add, pack, part, scale, sub, tensor_bytes
from fedllm.core.reduce import Mean
from fedllm.methods._late import REAL


@dataclass(frozen=True)
class Stragglers(Method):
    """FedAvg with over-selection, a deadline, partial work, and FedNova's weights.

    Of the A clients that the recipe asks in a round, A / over answers close it: what comes later is lost, with its
    bytes counted. With a `deadline` each client makes as many steps as fit. Too few answers (`min_results`): the model
    stays, the round is skipped and recorded.
    """

    card = Card(
        title="Stragglers: deadlines, over-selection, partial work",
        paper="Bonawitz et al., Towards Federated Learning at Scale: System Design, MLSys 2019, arXiv 1902.01046; Wang "
              "et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, NeurIPS "
              "2020, arXiv 2007.07481 (FedNova)",
        topic="time", sends="down: the trainables, a time budget; up: the change a step, steps, n, the loss",
        needs="any model and space; for budgets a declared pace (clients.step_seconds)",
        claim=Claim("over-selection by 1.3 cuts the virtual time to the target, with log-normal speeds (sigma 1), to "
                    "1 / 1.8 of FedAvg's", rig="asynchrony", metric="seconds", baseline="fedavg", relative="ratio",
                    holds="<=", threshold=1 / 1.8, options={"asked": 13, "knobs": {"over": 1.3}},
                    unequal="what is measured is the time to a target, and each works until it is there"),
        also={"fednova": Claim("with 2 to 40 local steps by speed, FedNova's weights end at most 0.8 of plain "
                               "averaging's distance from the optimum", rig="unequal_steps", metric="ratio", holds="<=",
                               threshold=0.8, seeds=5)},
        evidence="FedProx's proximal term is the method `fedprox`. FedNova for plain SGD steps: tau_k steps of equal "
                 f"weight. {REAL}",
    )
    trial = Trial({"over": 1.0})
    over: float = knob(1.3, "clients asked for each answer that is needed", ge=1)
    deadline: float | None = knob(None, "seconds from asking to answering; None: the recipe's", gt=0)
    min_results: int = knob(1, "answers without which the model stays", ge=1)
    normalize: Literal["none", "fednova"] = knob("none", "average changes, or changes a step times the mean steps",
                                                 options=("none", "fednova"))

    @property
    def by_arrival(self) -> bool:  # type: ignore[override]
        return self.over > 1

    def round(self, state, clients) -> Program:
        enough = max(1, math.floor(len(clients) / self.over + 1e-9))
        msgs = {c.id: pack(theta=state["theta"], budget=self.deadline) for c in clients}
        out = yield Ask(self.local, msgs, quorum=min(self.min_results, len(clients)), deadline=self.deadline,
                        enough=enough if self.over > 1 else None)
        d = part(out.value, "delta")
        if self.normalize == "fednova":
            d = scale(d, out.value["tau"])  # w <- w + tau_eff sum_k a_k d_k, tau_eff = sum_k a_k tau_k
        return {**state, "theta": add(state["theta"], d)}

    @on_client(reduce=Mean(), gives="delta: tree, tau: number, n: rows, loss?: number")
    def local(self, msg, client):
        theta, steps = part(msg, "theta"), client.training.count(client.n)
        if (budget := msg.get("budget")) is not None and client.pace:
            fits = math.floor((budget - on_the_way(theta, client.profile)) / client.pace + 1e-9)
            if fits < 1:
                raise Withheld(f"a step takes {client.pace:g} s here, and the budget is {budget:g} s with the way")
            steps = min(steps, fits)
        fitted = client.fit(theta, steps=steps)
        delta = sub(fitted.theta, theta)
        if self.normalize == "fednova":
            delta = scale(delta, 1 / fitted.steps)  # d_k = D_k / tau_k
        return pack(delta=delta, tau=float(fitted.steps), n=client.n, loss=fitted.loss)


def on_the_way(theta, profile) -> float:
    """Seconds that the trainables travel, down and up; a tenth more for names and framing."""
    return 2 * profile.latency + (2.2 * tensor_bytes(theta) / profile.bandwidth if profile.bandwidth else 0.0)

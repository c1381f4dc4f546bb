"""SCAFFOLD: each client knows how its gradient differs from everyone's, and steps against the difference."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, scale, sub, zeros_like
from fedllm.core.reduce import Mean
from fedllm.local.terms import Linear
from fedllm.methods._plain_sgd import need_sgd


@dataclass(frozen=True)
class Scaffold(Star):
    """Control variates c (server) and c_k (clients) take client drift out of the local gradient."""

    card = Card(
        title="SCAFFOLD: stochastic controlled averaging",
        paper="Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020, "
              "arXiv 1910.06378",
        topic="baselines",
        sends="down: the trainables and c; up: the change of both, as large again as FedAvg's",
        needs="clients that remember c_k; plain SGD",
        claim=Claim("on clients with different curvatures and minima it reaches the optimum, where FedAvg stalls",
                    rig="quadratic", metric="suboptimality", holds="<=", threshold=1e-12, wins=5,
                    options={"rounds": 150}),
        evidence="Option II of the paper's algorithm 1 (option I costs a pass over all rows).",
    )
    reads_rates = True
    trial = Trial(local={"optimizer": "sgd", "lr": 0.1})
    server_lr: float = knob(1.0, "eta_g, the server's step along the mean change", gt=0)
    clients: int | None = knob(None, "N, how many clients there are; None: as many as have answered so far", ge=1)
    allow_adaptive: bool = knob(False, "run with a local optimizer other than plain SGD, outside of the theory")

    def init(self, model) -> State:
        theta = model.initial()
        return {"theta": theta, "c": zeros_like(theta), "seen": []}

    def check_work(self, local, rounds) -> None:
        if not self.allow_adaptive:
            need_sgd(local, "scaffold", "c_k is no mean gradient otherwise",
                     "local.optimizer = sgd with momentum = 0, or method.allow_adaptive = true")

    def down(self, state: State, client):
        return pack(theta=state["theta"], c=state["c"])

    @on_client(reduce=Mean("uniform"), gives="delta: tree, delta_c: tree, loss?: number")
    def local(self, msg, client):
        self.check_work(client.training, 0)
        theta, c = part(msg, "theta"), part(msg, "c")
        c_k = client.memory.get("c") or zeros_like(c)
        fitted = client.fit(theta, terms=[Linear(sub(c, c_k))])  # theta <- theta - eta (g_k(theta) - c_k + c)
        # c_k+ = c_k - c + (theta_t - theta) / (H eta), with the sum of the rates in place of H eta
        new = add(sub(c_k, c), sub(theta, fitted.theta), 1 / fitted.lr_sum)
        client.memory["c"] = new
        return pack(delta=sub(fitted.theta, theta), delta_c=sub(new, c_k), loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        theta = add(state["theta"], part(out.value, "delta"), self.server_lr)
        seen = sorted({*state["seen"], *out.answered})
        before, n = self.clients or len(state["seen"]), self.clients or len(seen)
        # c <- c + (1/N) sum_k delta_c_k; where N grew, c was a mean over the fewer clients known before
        c = add(scale(state["c"], before / n), part(out.value, "delta_c"), len(out.answered) / n)
        return {**state, "theta": theta, "c": c, "seen": seen}

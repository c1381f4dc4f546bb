"""FedAvg: train at home, average what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean


@dataclass(frozen=True)
class FedAvg(Star):
    """Federated averaging of whatever the space trains."""

    card = Card(
        title="FedAvg: federated averaging",
        paper="McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS "
              "2017, arXiv 1602.05629",
        topic="baselines",
        sends="down: the trainables; up: their change, the number of examples, the training loss",
        needs="any model and space",
        claim=Claim("reaches a lower loss on the IID test than clients that train alone, on the same work",
                    rig="label_skew", metric="global_loss", baseline="local_only", relative="difference",
                    holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
    )
    server_lr: float = knob(1.0, "eta_s, the server's step along the mean change", gt=0)
    weighting: Literal["n", "uniform"] = knob("n", "clients weigh by their examples, or all alike",
                                              options=("n", "uniform"))

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        n = client.n if self.weighting == "n" else 1
        return pack(delta=sub(fitted.theta, theta), n=n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # theta_{t+1} = theta_t + eta_s * sum_k p_k (theta_k - theta_t)
        return {**state, "theta": add(state["theta"], part(out.value, "delta"), self.server_lr)}

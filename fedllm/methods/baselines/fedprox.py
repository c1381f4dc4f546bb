"""FedProx: FedAvg with a spring that holds each client near the model that it was sent."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.terms import Proximal


@dataclass(frozen=True)
class FedProx(Star):
    """Clients minimize F_k(theta) + mu/2 ||theta - theta_t||^2 over the trainables; the server averages."""

    card = Card(
        title="FedProx: a proximal term against drift",
        paper="Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv 1812.06127",
        topic="baselines",
        sends="down: the trainables; up: their change, the number of examples, the training loss",
        needs="any model and space",
        claim=Claim("on clients with different curvatures and minima it ends nearer to the true optimum than FedAvg, "
                    "each at its best rate",
                    rig="quadratic", metric="distance", baseline="fedavg", relative="ratio", holds="<", threshold=1.0,
                    options={"knobs": {"mu": 1.0}}, grid={"local.lr": (0.01, 0.02, 0.05, 0.1, 0.2)}),
        evidence="On LoRA the penalty acts on A and B, not on their product. Under label skew with AdamW it is not "
                 "better than FedAvg (dossier: slightly worse in 5 of 5 seeds).",
    )
    trial = Trial({"mu": 0.1})
    mu: float = knob(0.01, "strength of the proximal term; 0 is FedAvg", ge=0)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        terms = [Proximal(self.mu, theta)] if self.mu else []  # + mu/2 ||theta - theta_t||^2
        fitted = client.fit(theta, terms=terms)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

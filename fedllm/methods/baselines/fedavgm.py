"""FedAvgM: the server steps along a running sum of mean changes, as momentum does."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import add, pack, part, scale, sub, zeros_like
from fedllm.core.reduce import Mean


@dataclass(frozen=True)
class FedAvgM(Star):
    """Server momentum on the mean client change."""

    card = Card(
        title="FedAvgM: server momentum",
        paper="Hsu, Qi and Brown, Measuring the Effects of Non-Identical Data Distribution, 2019, arXiv 1909.06335",
        topic="baselines",
        sends="down: the trainables; up: their change, the number of examples, the training loss",
        needs="any model and space; the server keeps one tree of the trainables' size",
        claim=Claim("ends with a lower loss on the IID test than FedAvg after the same rounds and local work, "
                    "each at its best rates",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0, options={"knobs": {"momentum": 0.5}},
                    grid={"local.lr": (3e-3, 1e-2), "knobs.server_lr": (0.03, 0.1, 1.0, 2.0)}),
        evidence="A running sum as in the paper, no average: some ports scale D by 1 - momentum.",
    )
    server_lr: float = knob(1.0, "eta_s, the server's step", gt=0)
    momentum: float = knob(0.9, "beta, share of the last step that is kept; 0 is FedAvg", ge=0, lt=1)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        u = state.get("u") or zeros_like(state["theta"])
        u = add(scale(u, self.momentum), part(out.value, "delta"))  # u <- beta u + D
        return {**state, "theta": add(state["theta"], u, self.server_lr), "u": u}

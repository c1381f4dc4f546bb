"""FedAdagrad: the server divides the mean change by the root of all squared changes so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import pack, part, sub, tree_map, zeros_like
from fedllm.core.reduce import Mean


@dataclass(frozen=True)
class FedAdagrad(Star):
    """Adagrad on the server, with the mean client change as its gradient."""

    card = Card(
        title="FedAdagrad: Adagrad on the server",
        paper="Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295",
        topic="baselines",
        sends="down: the trainables; up: their change, the number of examples, the training loss",
        needs="any model and space; the server keeps two trees of the trainables' size",
        claim=Claim("ends with a lower loss on the IID test than FedAvg after the same rounds and local work",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0, wins=4, options={"knobs": {"server_lr": 0.03}}),
        evidence="The knobs of the claim were chosen on another seed. "
                 "Algorithm 2 of the paper, v_0 = tau^2; v is fed with D^2 (some ports feed it m^2). "
                 "Measured: the claim does not hold on our rig (2 of 5 seeds).",
    )
    server_lr: float = knob(1e-3, "eta_s, the size of the server's step; the paper searches 1e-3 to 10", gt=0)
    beta1: float = knob(0.0, "decay of the first moment", ge=0, lt=1)
    tau: float = knob(1e-3, "added to sqrt(v): the larger, the less adaptive", gt=0)

    @on_client(reduce=Mean())
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        d, theta = part(out.value, "delta"), state["theta"]  # D = sum_k p_k (theta_k - theta_t)
        m = state.get("m") or zeros_like(theta)
        v = state.get("v") or tree_map(lambda x: torch.full_like(x, self.tau**2), theta)  # v_0 = tau^2
        m = tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, m, d)  # no bias correction, as in the paper
        v = tree_map(lambda v, d: v + d * d, v, d)
        # theta_(t+1) = theta_t + eta_s m / (sqrt(v) + tau)
        theta = tree_map(lambda x, m, v: x + self.server_lr * m / (v.sqrt() + self.tau), theta, m, v)
        return {**state, "theta": theta, "m": m, "v": v}

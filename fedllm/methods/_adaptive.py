"""Adaptive server optimizers (Reddi et al., ICLR 2021, Algorithm 2): all that they share; they differ in v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.ask import on_client
from fedllm.core.method import Star, State, knob
from fedllm.core.payload import pack, part, sub, tree_map, zeros_like
from fedllm.core.reduce import Mean

SENDS = "down: the trainables; up: their change, the number of examples, the training loss"
NEEDS = "any model and space; the server keeps two trees of the trainables' size"


@dataclass(frozen=True)
class Adaptive(Star):
    """The mean client change D is the server's gradient: m and v are its running moments, and v is the method's own."""

    server_lr: float = knob(1e-3, "eta_s, the size of the server's step; the paper searches 1e-3 to 10", gt=0)
    beta1: float = knob(0.9, "decay of the first moment", ge=0, lt=1)
    tau: float = knob(1e-3, "added to sqrt(v): the larger, the less adaptive", gt=0)

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """The next second moment of one tensor, from the last one and D."""
        raise NotImplementedError

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        d, theta = part(out.value, "delta"), state["theta"]  # D = sum_k p_k (theta_k - theta_t)
        m = state.get("m") or zeros_like(theta)
        v = state.get("v") or tree_map(lambda x: torch.full_like(x, self.tau**2), theta)  # v_0 = tau^2
        m = tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, m, d)  # no bias correction, as in the paper
        v = tree_map(self.second, v, d)
        # theta_(t+1) = theta_t + eta_s m / (sqrt(v) + tau)
        theta = tree_map(lambda x, m, v: x + self.server_lr * m / (v.sqrt() + self.tau), theta, m, v)
        return {**state, "theta": theta, "m": m, "v": v}

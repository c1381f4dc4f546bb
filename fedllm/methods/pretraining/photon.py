"""Photon: federated pre-training of language models, with a server optimizer on the clients' mean change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Payload, add, pack, part, scale, sub, zeros_like
from fedllm.core.reduce import Mean

LINES = {"local": {"optimizer": "adamw", "steps": 12}, "rounds": 10, "sizes": (32,)}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2, 3e-2)}


@dataclass(frozen=True)
class Photon(Star):
    """Delta = theta - sum_k p_k theta_k, folded as it comes, into FedAvg, FedMom or Nesterov at the server."""

    card = Card(
        title="Photon: federated LLM pre-training",
        paper="Sani et al., Photon: Federated LLM Pre-Training, MLSys 2025, arXiv 2411.02908; Sani et al., The Future "
              "of Large Language Model Pre-training is Federated, 2024, arXiv 2405.10853",
        topic="pre-training",
        sends="down: the trainables; up: their change, n, the training loss",
        needs="any model and space (pre-training: space full, model.weights random); local.steps H, best with a high "
              "local.lr over small batches, local.warmup and over_rounds cosine_steps, which falls over all rounds",
        claim=Claim("from random weights, clients that pre-train together end at least 0.25 below those that train "
                    "alone on the same steps, each at its best inner rate", rig="tiny_lm", metric="fall",
                    baseline="local_only", relative="difference", holds=">=", threshold=0.25, options=LINES,
                    grid=RATES),
        also={"averaging": Claim("Nesterov at the server ends no more than 0.05 above plain averaging, each at "
                                 "its best inner rate", rig="tiny_lm", metric="fall", baseline="photon",
                                 relative="difference", holds=">=", threshold=-0.05, options=LINES, grid=RATES,
                                 against={"knobs": {"server": "fedavg"}})},
        evidence="Strategies and defaults of the official code from a dossier; its scaling of averaged weights by the "
                 "number of clients is left out, since it multiplies weights and not their change. FedAdam and FedYogi "
                 "are the methods of those names; moments are never averaged (they stay at a client here), and layers "
                 "that stay personal are fedper's.",
    )
    server: Literal["nesterov", "fedmom", "fedavg"] = knob("nesterov", "the server's optimizer",
                                                           options=("nesterov", "fedmom", "fedavg"))
    server_lr: float = knob(0.7, "eta, the server's rate (not of fedavg)", gt=0, le=2)
    server_momentum: float = knob(0.7, "beta (not of fedavg)", ge=0, lt=1)
    reset_optimizer: bool = knob(True, "whether a client's optimizer begins afresh in each round")

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta = part(msg, "theta")
        if self.reset_optimizer:
            fitted = client.fit(theta)
        else:
            fitted = client.fit(theta, moments=client.memory.get("inner"))
            client.memory["inner"] = fitted.moments
        return pack(delta=sub(theta, fitted.theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        theta, g = state["theta"], part(out.value, "delta")  # Delta = theta - sum_k p_k theta_k
        if self.server == "fedavg":
            return {**state, "theta": sub(theta, g)}
        if self.server == "fedmom":  # v' = theta - eta Delta;  theta <- (1 + beta) v' - beta v
            new, old = add(theta, g, -self.server_lr), state.get("v") or theta
            return {**state, "theta": add(new, sub(new, old), self.server_momentum), "v": new}
        m = add(scale(state.get("m") or zeros_like(g), self.server_momentum), g)  # m <- beta m + Delta
        step = add(g, m, self.server_momentum)  # theta <- theta - eta (Delta + beta m)
        return {**state, "theta": add(theta, step, -self.server_lr), "m": m}

"""FFA-LoRA: everyone draws the same random A once and keeps it; only B is trained and sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.methods._factors import need_lora

A = "lora_A.weight"


@dataclass(frozen=True)
class FFALoRA(Star):
    """Frozen A makes the update linear in B: averages are exact, and noise on B adds without a product of noises."""

    card = Card(
        also={f"epsilon_{e}": Claim(
            f"under DP-SGD at epsilon {e} its loss is at most LoRA's (FedIT's), each at its best learning rate",
            rig="private_chain", metric="best_loss", baseline="fedit", relative="difference", holds="<=", threshold=0.0,
            seeds=5, wins=4, options={"epsilon": float(e)}) for e in (1, 3, 8)} | {
            "skew": Claim("under label skew it ends with a lower loss than FedIT on the same work, each at its best "
                          "rate",
                          rig="label_skew", metric="global_loss", baseline="fedit", relative="difference", holds="<",
                          threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        title="FFA-LoRA: federated freeze-A LoRA",
        paper="Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313",
        topic="efficiency",
        sends="down: B (and heads), up: their change; A never travels, each side draws it from the run's seed",
        needs="the space lora, one rank for all",
        claim=Claim("its average is the average of the clients' products, with about half of FedIT's bytes",
                    rig="exactness", metric="error", holds="<=", threshold=1e-6, kind="exact"),
        evidence="The paper's abstract and third-party code. With A fixed, alpha only rescales the learning rate, and "
                 "two to ten times LoRA's rate is usual; at one untuned rate its loss was below FedIT's on our rig "
                 "in 5 of 5 seeds (0 to 4), and claim `skew` says what tuning leaves.",
    )
    a_init: Literal["kaiming", "orthogonal"] = knob("kaiming", "how A is drawn", options=("kaiming", "orthogonal"))

    def init(self, model) -> State:
        need_lora(self, model)
        return {"theta": self.start(model)}

    def start(self, model) -> Tree:
        """The first trainables: A_0 is a function of the model's seed, so both sides draw the same."""
        theta = model.initial()
        if self.a_init == "kaiming":
            return theta
        return {n: orthogonal(x, model.seed, n) if n.endswith(A) else x for n, x in theta.items()}

    def down(self, state: State, client):
        return pack(theta=moving(state["theta"]))

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = {**client.once(FFALoRA.start, self, client.model), **part(msg, "theta")}
        fitted = client.fit(theta, freeze=["*." + A])
        return pack(delta=moving(sub(fitted.theta, theta)), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # (sum_k p_k B_k) A_0 = sum_k p_k B_k A_0
        return {**state, "theta": state["theta"] | add(moving(state["theta"]), part(out.value, "delta"))}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score({**client.once(FFALoRA.start, self, client.model), **part(msg, "theta")}, on=msg["on"])


def moving(tree: Tree) -> Tree:
    """All but A."""
    return {n: x for n, x in tree.items() if not n.endswith(A)}


def orthogonal(a: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Orthonormal rows [r, i], scaled to the norm that Kaiming's draw has on average."""
    rows = torch.linalg.qr(torch.randn(a.shape[1], a.shape[0], generator=torch_stream(seed, "A", name))).Q.mT
    return (rows / 3**0.5).to(a.dtype)

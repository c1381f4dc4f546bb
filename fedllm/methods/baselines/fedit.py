"""FedIT: federated instruction tuning, which is FedAvg of LoRA's two factors, each on its own."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Moves, Star, State
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._factors import need_lora


@dataclass(frozen=True)
class FedIT(Star):
    """Average A and B apart: (sum p_k B_k)(sum p_k A_k) is not sum p_k B_k A_k, and that is not mended here."""

    card = Card(
        title="FedIT: federated instruction tuning",
        paper="Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, ICASSP 2024, "
              "arXiv 2305.05644",
        topic="baselines", moves=Moves("adapters", "to owner", "owner", ("rows",)),
        sends="down: A and B; up: their change, the number of examples, the training loss",
        needs="the space lora, one rank for all",
        claim=Claim("reaches a lower loss on the IID test than clients that train alone, on the same work",
                    rig="label_skew", metric="global_loss", baseline="local_only", relative="difference",
                    holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        evidence="Repository of the authors read; its selection of clients and its training on prompts are the "
                 "recipe's matter here.",
    )

    def init(self, model) -> State:
        need_lora(self, model, plain=False)
        return super().init(model)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # A <- sum_k p_k A_k and B <- sum_k p_k B_k
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

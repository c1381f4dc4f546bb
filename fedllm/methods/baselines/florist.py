"""FLoRIST: stack all factors, and broadcast only the singular directions that hold a share of the energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, pack, part
from fedllm.methods._drift import grown, held, news, start
from fedllm.methods._factors import Products, fresh, need_lora, split_heads, svds
from fedllm.methods._linalg import Svd, cut

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FLoRIST(Star):
    """FLoRA whose stack is cut, layer by layer, to the least rank with sum_{j<=q} S_j^2 >= tau sum S^2."""

    card = Card(
        title="FLoRIST: singular value thresholding",
        paper="Ramesh and Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning "
              "of Large Language Models, 2025, arXiv 2506.09199",
        topic="baselines",
        sends="down: the thresholded factors of the last round, sum_l q_l (o + i) (late joiners: the whole drift); up: "
              "A_k and B_k of the client's own rank",
        needs="the space lora; a base that can drift; profiles with ranks (the space's rank where there is none)",
        claim=Claim("at tau = 0.99 its loss on the IID test is within 0.02 of FLoRA's, on the same work",
                    rig="label_skew", metric="global_loss", baseline="flora_stacking", relative="difference",
                    holds="<=", threshold=0.02, options={"knobs": {"tau": 0.99}}, grid=LR),
        also={"bytes": Claim("and its messages are at most 0.8 of FLoRA's bytes, both ways together", rig="label_skew",
                             metric="train_bytes", baseline="flora_stacking", relative="ratio", holds="<=",
                             threshold=0.8, options={"knobs": {"tau": 0.99}}),
              "cheap": Claim("at tau = 0.9 too its loss is within 0.02 of FLoRA's", rig="label_skew",
                             metric="global_loss", baseline="flora_stacking", relative="difference", holds="<=",
                             threshold=0.02, options={"knobs": {"tau": 0.9}}, grid=LR)},
        evidence="From the abstract, notes and a port that multiplies the product out and forgets alpha / r. How a "
                 "round begins is not told there; here as FLoRA's: merge, and start a new LoRA.",
    )
    trial = Trial(space={"name": "lora", "rank": 8}, ranks=(1, 2, 4, 8))
    reads_ranks = True

    tau: float = knob(0.99, "share of each module's energy (squares of singular values) that is broadcast; 1: FLoRA",
                      gt=0, le=1)
    split: Literal["balanced", "us_v"] = knob("balanced", "how S is shared out over what is broadcast",
                                              options=("balanced", "us_v"))

    def init(self, model: Any) -> State:
        need_lora(self, model)
        return {"theta": model.initial(), "ranks": {}, **start()}

    def down(self, state: State, client):
        return pack(heads=split_heads(state["theta"])) | news(state, client.id)

    @on_client(reduce=Products(), gives="theta: tensors, n: rows, scale: count, loss?: number")
    def local(self, msg, client):
        base = held(client, msg)  # W <- W + B_g A_g
        rank = client.profile.rank or client.model.space.rank
        theta = fresh(client, rank, "florist") | part(msg, "heads")  # A random, B = 0
        fitted = client.fit(theta, base=base)
        return pack(theta=fitted.theta, n=client.n, scale=client.model.space.scale(rank), loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        # sum_k p_k s_k B_k A_k = U S V^T from the small core of the stacked factors, and its first q directions
        kept = {path: self.thresholded(svd) for path, svd in svds(out.value).items()}
        step = {f"{side}/{path}": pair[i] for path, pair in kept.items() for i, side in enumerate("BA")}
        theta = state["theta"] | part(out.value, "theta")  # only the heads come averaged; B stays zero
        return {"theta": theta, "ranks": {path: len(a) for path, (_, a) in kept.items()},
                **grown(state, step, out.answered)}

    def thresholded(self, svd: Svd) -> tuple[torch.Tensor, torch.Tensor]:
        """B [o, q] and A [q, i] with q the least that holds tau of the energy; of a product of zeros one direction."""
        energy = svd[1].double().square().cumsum(0)
        q = int((energy < self.tau * energy[-1] * (1 - 1e-12)).sum()) + 1
        return cut(svd, min(q, len(energy)), self.split)

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return state["theta"], state["drift"] or None

    def report(self, state: State):
        return {"rank_of_each_module": dict(state["ranks"])}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(part(msg, "heads"), base=held(client, msg), on=msg["on"])

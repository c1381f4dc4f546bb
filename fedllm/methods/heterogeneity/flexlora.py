"""FlexLoRA: add up everyone's full-size updates, and give each client the best cut of the sum that its rank allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, pack, part
from fedllm.methods._factors import Products, need_lora, rank_of, split_heads, svds
from fedllm.methods._linalg import cut
from fedllm.spaces.lora import factors, names_of

RANKS = {"ranks": (1, 1, 1, 1, 2, 2, 4, 8), "space": {"rank": 8, "alpha": 16.0, "scaling": "shared"}}
LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FlexLoRA(Star):
    """M = sum_k p_k s_k B_k A_k, its SVD by factors, and rank-r_j slices of it for every client j."""

    card = Card(
        title="FlexLoRA: SVD redistribution over heterogeneous ranks",
        paper="Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
              "Resources, NeurIPS 2024, arXiv 2402.11505",
        topic="heterogeneity",
        sends="down: the best factors of the client's rank; up: the trained ones, r_k (o + i) a module each way",
        needs="the space lora; profiles with ranks (the space's rank where there is none)",
        claim=Claim("with ranks 1, 1, 1, 1, 2, 2, 4, 8 it ends with a lower loss on the IID test than HetLoRA",
                    rig="label_skew", metric="global_loss", baseline="hetlora", relative="difference",
                    holds="<=", threshold=0.0, options=RANKS, grid=LR),
        also={"rank_1": Claim("and lower than FedIT where all have the least of these ranks, 1", rig="label_skew",
                              metric="global_loss", baseline="fedit", relative="difference", holds="<", threshold=0.0,
                              options=RANKS, grid=LR,
                              against={"ranks": (), "space": {"rank": 1, "alpha": 16.0, "scaling": "shared"}})},
        evidence="Authors' code read; it multiplies B A out and splits U S | V^T, which is `us_v`. The SVD here works "
                 "on the stacked factors and gives the same singular values.",
    )
    trial = Trial(space={"name": "lora", "rank": 8}, ranks=(1, 2, 4, 8), rounding="the signs of an SVD are free")
    reads_ranks = True

    split: Literal["balanced", "us_v"] = knob("balanced", "how S is shared out: sqrt(S) to each factor, or all to B",
                                              options=("balanced", "us_v"))

    def init(self, model) -> State:
        space = need_lora(self, model)
        theta = model.initial()
        limit = min(min(b.shape[0], a.shape[1]) for b, a in factors(theta).values())
        scales = [space.scale(r) for r in range(1, limit + 1)]  # s for rank 1, 2, ...
        return {"theta": theta, "start": theta, "rank": space.rank, "scale": scales, "svd": {}}

    def down(self, state: State, client):
        return pack(theta=self.slices(state, client.profile.rank or state["rank"]))

    def slices(self, state: State, rank: int) -> Tree:
        """B_j = U[:, :r] S[:r] / s_j and A_j = V[:, :r]^T (or balanced), and the heads."""
        tree, s = dict(state["theta"]), state["scale"][rank - 1]
        for path, (b0, a0) in factors(state["start"]).items():
            b_name, a_name = names_of(path)
            b, a = b0.new_zeros(b0.shape[0], rank), a0.new_zeros(rank, a0.shape[1])
            live = torch.zeros(rank, dtype=torch.bool)
            if path in state["svd"]:
                u, sv, vt = (state["svd"][path][k] for k in ("U", "S", "Vt"))
                b, a = cut((u, sv / s, vt), rank, self.split)
                live[: len(sv)] = sv[:rank] > 1e-7 * sv[0].clamp_min(1e-30)
            # a rank beyond the spectrum would be zero on both sides and never learn: B = 0 with the first A instead
            spare = a0[torch.arange(rank) % len(a0)]
            tree[b_name], tree[a_name] = b * live.to(b.dtype), torch.where(live[:, None], a, spare)
        return tree

    @on_client(reduce=Products(), gives="theta: tree, n: rows, scale: count, loss?: number")
    def local(self, msg, client):
        fitted = client.fit(part(msg, "theta"))
        s_k = client.model.space.scale(rank_of(fitted.theta))
        return pack(theta=fitted.theta, n=client.n, scale=s_k, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        svd = {path: dict(zip(("U", "S", "Vt"), parts, strict=True)) for path, parts in svds(out.value).items()}
        new = {**state, "svd": svd, "theta": state["theta"] | split_heads(part(out.value, "theta"))}
        return {**new, "theta": self.slices(new, state["rank"])}

"""HetLoRA: weak clients train the first rows of everyone's LoRA, strong ones more, and ranks that idle are pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, pack, part, sub
from fedllm.local.terms import sum_lanes
from fedllm.methods._factors import Padded, first_ranks, need_lora, rank_of, ranks_within
from fedllm.methods._linalg import product_norm
from fedllm.spaces.lora import factors, names_of


@dataclass(frozen=True)
class Tail:
    """lambda sum_m ||B_m[:, g:]||_F ||A_m[g:, :]||_F; the tensors are 0/1 masks, so lanes may differ in g."""

    weight: float
    tensors: Tree

    @property
    def key(self):
        return ("tail", self.weight)

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        # the root has no gradient at 0, where B starts: the clamp gives 0 there
        size = {n: sum_lanes({n: (theta[n] * m).pow(2)}).clamp_min(1e-24).sqrt() for n, m in tensors.items()}
        pairs = [(n, n.replace("lora_B", "lora_A")) for n in tensors if "lora_B" in n]
        return self.weight * torch.stack([size[b] * size[a] for b, a in pairs]).sum(0)  # [K]


@dataclass(frozen=True)
class HetLoRA(Star):
    """Client k holds the first r_k of r_max ranks; clients with larger updates weigh more."""

    card = Card(
        title="HetLoRA: heterogeneous ranks with self-pruning",
        paper="Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
              "arXiv 2401.06432",
        topic="heterogeneity",
        sends="down: the client's r_k rows and columns; up: their change, r_k (o + i) a module",
        needs="the space lora with scaling = shared (truncation must not change the function); profiles with ranks",
        claim=Claim("a client of rank 1 uploads less than a quarter of what rank 8 takes, names and framing included",
                    rig="exactness", metric="weakest_upload", baseline="fedit", relative="ratio",
                    holds="<", threshold=0.25, kind="exact"),
        also={"rank_1": Claim("with ranks 1, 1, 1, 1, 2, 2, 4, 8 it ends with a lower loss than FedIT where all have "
                              "rank 1", rig="label_skew", metric="global_loss", baseline="fedit", relative="difference",
                              holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)},
                              options={"ranks": (1, 1, 1, 1, 2, 2, 4, 8),
                                       "space": {"rank": 8, "alpha": 16.0, "scaling": "shared"}},
                              against={"ranks": (), "space": {"rank": 1, "alpha": 16.0, "scaling": "shared"}})},
        evidence="From two re-implementations and memory of the paper, whose setting is gamma 0.99, ranks 5 to 50. "
                 "floor(gamma r) would regularize all of a rank-1 client; here `rank_min` ranks are always left alone.",
    )
    trial = Trial(space={"name": "lora", "rank": 4, "scaling": "shared"}, ranks=(1, 2, 4, 4))
    reads_ranks = True

    gamma: float = knob(0.99, "share of the ranks that the regularizer leaves alone", gt=0, lt=1)
    lambda_reg: float = knob(1e-3, "weight of the regularizer on the tail", ge=0)
    prune: bool = knob(True, "cut the tail when training made it smaller")
    rank_min: int = knob(1, "ranks that pruning leaves at least", ge=1)
    aggregation: Literal["sparsity", "examples"] = knob(
        "sparsity", "clients weigh by ||B_k A_k||_F, or by their examples", options=("sparsity", "examples"))
    uncovered: Literal["zero", "keep"] = knob("zero", "ranks that no client of the round holds: averaged as zeros as "
                                              "in the paper, or kept", options=("zero", "keep"))

    def init(self, model) -> State:
        space = need_lora(self, model)
        if space.scaling != "shared":
            raise CompositionError(f"hetlora and space.scaling = {space.scaling} do not fit together: cutting a rank "
                                   "would rescale the update; use space.scaling = shared")
        return {"theta": model.initial(), "rank": space.rank}

    def check_profiles(self, model, clients) -> None:
        ranks_within(clients, model.space.rank)

    def round(self, state: State, clients):
        ranks = ranks_within(clients, state["rank"])
        if self.prune:  # r_k is the client's own; it says what pruning has left
            said = yield Ask(self.rank, {c: pack(rank=r) for c, r in ranks.items()})
            ranks = {c: said[c]["rank"] for c in said}
        out = yield Ask(self.local, {c: pack(theta=first_ranks(state["theta"], r), rank_max=state["rank"])
                                     for c, r in ranks.items()})
        return self.merge(state, out)

    def holds(self, msg, reply):
        r = reply["rank"]
        need(isinstance(r, int) and 1 <= r <= msg["rank"], f"'rank' is {r}, allowed is 1 to {msg['rank']}")

    @on_client(gives="rank: count", fits=holds)
    def rank(self, msg, client):
        return pack(rank=min(client.memory.get("rank", msg["rank"]), msg["rank"]))

    def fits(self, msg, reply):
        theta, delta, (r, *more) = part(msg, "theta"), part(reply, "delta"), reply["cover"].shape or (0,)
        need(not more and reply["rank_max"] == msg["rank_max"] and 1 <= r <= rank_of(theta),
             f"'cover' has shape {tuple(reply['cover'].shape)}, allowed is a rank of 1 to {rank_of(theta)}")
        want = {n: tuple(t.shape) for n, t in first_ranks(theta, r).items()}
        need({n: tuple(t.shape) for n, t in delta.items()} == want, f"'delta' does not have the shapes of rank {r}")

    @on_client(reduce=Padded(), gives="delta: tensors, cover: tensor, rank_max: count, n: count, loss?: number",
               fits=fits)
    def local(self, msg, client):
        theta = part(msg, "theta")  # A[:r_k], B[:, :r_k]
        r = rank_of(theta)
        g = min(r, max(self.rank_min, math.floor(self.gamma * r)))  # a client's last rank is no tail
        terms = [Tail(self.lambda_reg, masks(theta, g))] if self.lambda_reg and g < r else []
        new = (fitted := client.fit(theta, terms=terms)).theta
        if self.prune and tail(new, g) < tail(theta, g):
            r = client.memory["rank"] = g
            new, theta = first_ranks(new, r), first_ranks(theta, r)
        # S_k = ||B_k A_k||_F; never quite 0, so that a round of zeros is a plain mean
        w = client.n if self.aggregation == "examples" else max(product_norm(factors(new).values()), 1e-12)
        cover = torch.ones(r, dtype=torch.float64)  # fp64, so that full cover is exactly 1
        return pack(delta=sub(new, theta), cover=cover, rank_max=msg["rank_max"], n=w, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # sum_k q_k pad(A_k) = A_t * (share of weight that holds the row) + sum_k q_k pad(delta_k)
        delta, cover = part(out.value, "delta"), out.value["cover"]  # [r_max]
        keep = torch.where(cover == 0, 1.0, cover) if self.uncovered == "keep" else cover
        theta = dict(state["theta"])
        for path in factors(theta):
            b, a = names_of(path)
            theta[a], theta[b] = theta[a] * keep[:, None].to(theta[a].dtype), theta[b] * keep.to(theta[b].dtype)
        return {**state, "theta": {n: (x + delta[n]).to(x.dtype) for n, x in theta.items()}}


def masks(theta: Tree, g: int) -> Tree:
    """1 on the tail of each factor: A's rows [r, 1] and B's columns [1, r] from g on."""
    out = {}
    for path, (_, a) in factors(theta).items():
        b_name, a_name = names_of(path)
        on = (torch.arange(len(a)) >= g).to(a.dtype)
        out[b_name], out[a_name] = on[None, :], on[:, None]
    return out


def tail(theta: Tree, g: int) -> float:
    """sum_m ||B_m[:, g:]||_F ||A_m[g:, :]||_F."""
    return sum(float(b[:, g:].norm() * a[g:].norm()) for b, a in factors(theta).values())

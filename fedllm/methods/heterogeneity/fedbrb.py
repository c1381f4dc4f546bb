"""FedBRB: clients that are all smaller than the model train one block of its width each, in turns, until all are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub, zeros_like
from fedllm.core.rng import numpy_stream
from fedllm.spaces.slices import Covered, Slice, blocks, cuts_of, joined


@dataclass(frozen=True)
class FedBRB(Method):
    """Each layer is G blocks; client k trains block (t + k) mod G; blocks are averaged over who had them, and mixed."""

    card = Card(
        title="FedBRB: block-wise rolling and weighted broadcast",
        paper="Xu et al., FedBRB: An Effective Solution to the Small-to-Large Scenario in Device-Heterogeneity "
              "Federated Learning, IEEE TMC 2026, arXiv 2402.17202",
        topic="heterogeneity",
        sends="down: a block of every layer and what is not cut (embeddings, norms, head), and its number; up: their "
              "change, which rows and columns they are, the shapes of all",
        needs="spaces that train a transformer's own weights (full, layers); n_blocks that divides heads and neurons",
        claim=Claim("where each client holds a quarter of every layer's width, the whole model ends with a lower loss "
                    "on the IID test than with slices that are always the same (HeteroFL's), on the same work",
                    rig="small_to_large", metric="over_static", holds="<", threshold=0.0),
        also={"bytes": Claim("a client's reply is at most 0.55 of FedAvg's, embeddings, norms and head included, which "
                             "are not cut", rig="small_to_large", metric="up_bytes", baseline="fedavg",
                             relative="ratio", holds="<=", threshold=0.55, kind="exact"),
              "whole": Claim("its loss is not above that of FedAvg, whose clients hold the whole model",
                             rig="small_to_large", metric="global_loss", baseline="fedavg", relative="difference",
                             holds="<=", threshold=0.0, grid={"local.lr": (1e-3, 2e-3, 5e-3)})},
        evidence="The paper's abstract and a note on it; no code. How a transformer is cut, and `calibrate`, are ours.",
    )
    trial = Trial({"n_blocks": 2}, space={"name": "full"})
    n_blocks: int = knob(4, "G: blocks of equal size that each layer is cut into", ge=1)
    blocks_per_client: int = knob(1, "how many of them a client trains in a round", ge=1)
    rolling: Literal["cyclic", "permuted", "static"] = knob(
        "cyclic", "clients move on by one block a round, get others at random, or always have the first",
        options=("cyclic", "permuted", "static"))
    broadcast_weight: float = knob(0.3, "lambda: how far each block is drawn to the mean of the round's", ge=0, le=1)
    broadcast_decay: Literal["linear", "cosine", "none"] = knob(
        "linear", "how lambda falls to 0", options=("linear", "cosine", "none"))
    broadcast_rounds: int = knob(20, "rounds after which it is 0", ge=1)
    calibrate: bool = knob(True, "multiply a small model's block outputs by G over its blocks, as all would add up")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks_per_client > self.n_blocks:
            raise RecipeError(f"FedBRB.blocks_per_client = {self.blocks_per_client} is not allowed; it must be <= "
                              f"n_blocks = {self.n_blocks}")

    def check(self, model: Any) -> None:
        cuts_of(model, self.n_blocks, "fedbrb")

    def init(self, model: Any) -> State:
        theta, cuts = model.initial(), cuts_of(model, self.n_blocks, "fedbrb")
        return {"theta": theta, "t": 0, "trained": [0] * self.n_blocks, "cuts": cuts}

    def round(self, state: State, clients):
        t, cuts = state["t"], [Slice(None, **state["cuts"][str(g)]) for g in range(self.n_blocks)]
        held = dict(zip((c.id for c in clients), self.deal(t, len(clients)), strict=True))
        views = {c: joined([cuts[g] for g in held[c]]) for c in held}
        out = yield Ask(self.local, {c: pack(theta=views[c].take(state["theta"]), blocks=held[c]) for c in held})
        theta = add(state["theta"], part(out.value, "delta"))  # what nobody held has a change of 0
        weights = [sum(float(c.n) for c in clients if c.id in out.answered and g in held[c.id])
                   for g in range(self.n_blocks)]
        return {**state, "theta": self.broadcast(theta, cuts, weights, t), "t": t + 1,
                "trained": [n + (w > 0) for n, w in zip(state["trained"], weights, strict=True)]}

    def deal(self, t: int, clients: int) -> list[list[int]]:
        """The blocks of each client in round t."""
        b, rng = self.blocks_per_client, numpy_stream("fedbrb", t)
        first = {"cyclic": range(t, t + clients * b, b), "static": [0] * clients,
                 "permuted": rng.permutation(clients) * b}[self.rolling]
        return [[int((at + j) % self.n_blocks) for j in range(b)] for at in first]

    @on_client(reduce=Covered(), gives="delta: some, at: places, n: rows, loss?: number")
    def local(self, msg, client):
        sent = part(msg, "theta")
        whole = client.once(nothing, client.model)  # zeros in the shape of all trainables
        cuts = blocks(client.model.net, whole, self.n_blocks)
        view = joined([cuts[g] for g in msg["blocks"]])
        gain = self.n_blocks / len(msg["blocks"]) if self.calibrate else 1.0
        outer = {n: gain for n in view.columns}  # sum_g W_g a_g ~ (G / b) sum_{g held} W_g a_g
        mine = {n: x * outer.get(n, 1.0) for n, x in sent.items()}
        fitted = client.fit(view.put(whole, mine))  # zeros elsewhere have zero gradients: this is the small network
        new = {n: x / outer.get(n, 1.0) for n, x in view.take(fitted.theta).items()}
        return pack(delta=sub(new, sent), at=view.places(whole), n=client.n, loss=fitted.loss)

    def broadcast(self, theta: Tree, cuts: list[Slice], weights: list[float], t: int) -> Tree:
        """W_j <- (1 - lambda_t) W_j + lambda_t sum_g q_g W_g, with q_g the share of data behind block g."""
        left = max(0.0, 1 - t / self.broadcast_rounds)
        lam = self.broadcast_weight * {"linear": left, "none": 1.0,
                                       "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[self.broadcast_decay]
        if lam == 0 or self.n_blocks == 1 or not sum(weights):
            return theta
        parts = [{n: x for n, x in cut.take(theta).items() if n in cut.rows or n in cut.columns} for cut in cuts]
        mean = {n: sum(w / sum(weights) * p[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0]}
        for cut, own in zip(cuts, parts, strict=True):
            only = Slice(tuple(own), cut.rows, cut.columns)
            theta = only.put(theta, {n: (1 - lam) * x + lam * mean[n] for n, x in own.items()})
        return theta

    def report(self, state: State) -> Mapping[str, Any]:
        return {"rounds_in_which_each_block_was_trained": list(state["trained"])}


def nothing(model: Any) -> dict[str, Tensor]:
    """Zeros in the shapes of the model's trainables."""
    return zeros_like(model.initial())

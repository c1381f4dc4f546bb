"""FedKSeed: tune every weight by messages of seeds and scalars, a few kilobytes for a model of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Payload, Tree, pack
from fedllm.core.reduce import Mean, Sum


class Pools(Sum):
    """Weighted mean of the clients' sums of scalars by candidate, whether they sent all K or only those they drew."""

    def lift(self, reply: Payload) -> Payload:
        g = reply.get("G")
        if g is None:
            g = torch.zeros(reply["K"]).index_add_(0, reply["at"].long(), reply["g"])
        return Mean().lift({"G": g, "n": reply["n"], "loss": reply["loss"]})

    def done(self, total: Payload) -> Payload:
        return Mean().done(total)


@dataclass(frozen=True)
class FedKSeed(Star):
    """Zeroth-order steps along K shared random directions z_j: w = w_0 - eta sum_j A_j z_j, so A is the model."""

    card = Card(
        title="FedKSeed: full-parameter tuning with K seeds",
        paper="Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
              "under 18 Kilobytes, ICML 2024, arXiv 2312.06353",
        topic="efficiency",
        sends="down: K accumulators and a seed; up: a scalar for each direction drawn",
        needs="any model and space (the paper's is full); the same base everywhere",
        claim=Claim("a round trip with 4,096 seeds and 200 steps takes at most 18 KB (18,432 bytes) on the wire",
                    rig="tiny_lm", metric="bytes_round_trip", holds="<=", threshold=18432, seeds=3, wins=3,
                    options={"rounds": 1, "knobs": {"K": 4096, "steps": 200, "lr": 3e-4}}),
        evidence="Authors' code read. One constant eta and no weight decay, or the replay would be wrong; replayed "
                 "from w_0 each round (once a process), so that every side holds the same bits.",
    )
    K: int = knob(4096, "number of candidate seeds", ge=1)
    steps: int = knob(200, "tau, local steps a round", ge=1)
    eps: float = knob(5e-4, "size of the perturbation", gt=0)
    lr: float = knob(3e-7, "eta, one rate for the whole run", gt=0)
    seed: int = knob(0, "from which the K candidate seeds follow", ge=0, lt=2**32)

    def init(self, model) -> State:
        return {"w0": model.initial(), "A": torch.zeros(self.K)}

    def down(self, state: State, client):
        return pack(A=state["A"], seed=self.seed)

    @on_client(reduce=Pools())
    def local(self, msg, client):
        if (client.local.schedule, client.local.over_rounds) != ("constant",) * 2 or client.local.weight_decay:
            raise CompositionError("fedkseed and a learning-rate schedule or weight decay do not fit together: the "
                                   "replay of seeds would be wrong; use local.schedule = local.over_rounds = constant, "
                                   "weight_decay = 0")
        tree = client.once(rebuild, client.model, msg["A"], msg["seed"], self.lr)
        w, seeds = flat(tree), candidates(msg["seed"], self.K)
        g_sum, losses = torch.zeros(self.K), []
        drawn = client.rng("fedkseed").integers(self.K, size=self.steps)
        for rows, j in zip(client.batches(self.steps), drawn, strict=True):
            z = direction(seeds[j], w)
            up = client.loss(unflat(w + self.eps * z, tree), rows)
            lo = client.loss(unflat(w - self.eps * z, tree), rows)
            g = float(np.float32((up - lo) / (2 * self.eps)))  # rounded as it will travel
            if not math.isfinite(g):
                continue
            w = w - self.lr * g * z
            g_sum[j] += g
            losses.append((up + lo) / 2)
        return pack(**self.sparse(g_sum, drawn), n=client.n, loss=float(np.mean(losses)) if losses else 0.0)

    def sparse(self, g_sum: Tensor, drawn: np.ndarray) -> dict[str, Any]:
        """Pairs (index, scalar), or all K scalars where that is shorter."""
        at = torch.from_numpy(np.unique(drawn))
        if 8 * len(at) >= 4 * self.K:
            return {"G": g_sum}
        return {"K": self.K, "at": at.int(), "g": g_sum[at]}

    def merge(self, state: State, out) -> State:
        return {**state, "A": state["A"] + out.value["G"]}  # A_j <- A_j + sum_k p_k G_kj

    def served(self, state: State) -> tuple[Tree, None]:
        return replay(state["w0"], state["A"], self.seed, self.lr), None

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client()
    def score(self, msg, client):
        return client.score(client.once(rebuild, client.model, msg["A"], msg["seed"], self.lr), on=msg["on"])


def candidates(seed: int, k: int) -> list[int]:
    """The K seeds."""
    return [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(k, np.uint64)]


def direction(seed: int, like: Tensor) -> Tensor:
    """z ~ N(0, I_P), drawn in fp32 over one flat vector, so that every machine draws the same."""
    return torch.randn(like.numel(), generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def flat(tree: Tree) -> Tensor:
    """All trainables as one vector [P], in name order."""
    return torch.cat([tree[n].flatten() for n in sorted(tree)])


def unflat(w: Tensor, like: Tree) -> Tree:
    """The vector [P] as a tree again; the leaves are views."""
    parts = dict(zip(sorted(like), w.split([like[n].numel() for n in sorted(like)]), strict=True))
    return {n: parts[n].view_as(x) for n, x in like.items()}


def replay(w0: Tree, a: Tensor, seed: int, lr: float) -> Tree:
    """w = w_0 - eta sum_j A_j z_j, always added in the order of j: equal bits on every side."""
    w, seeds = flat(w0).clone(), candidates(seed, len(a))
    for j in a.nonzero()[:, 0].tolist():
        w.sub_(direction(seeds[j], w), alpha=lr * float(a[j]))
    return unflat(w, w0)


def rebuild(model: Any, a: Tensor, seed: int, lr: float) -> Tree:
    """The model of these accumulators, from the base that every client has."""
    return replay(model.initial(), a, seed, lr)

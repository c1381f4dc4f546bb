"""FedASK: only B is trained (and noised), and yet A moves: the server refactors the mean product from two sketches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.methods._factors import need_lora, split_heads
from fedllm.methods._linalg import dense_svd
from fedllm.spaces.lora import factors, names_of

A = "lora_A.weight"


@dataclass(frozen=True)
class FedASK(Star):
    """sum_k p_k B_k A from B_k (A Omega) and A^T (B_k^T Q): what moves A is made of B's alone, private if they are."""

    card = Card(
        title="FedASK: LoRA under DP by two-stage sketching",
        paper="Wen et al., Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix, NeurIPS 2025, "
              "arXiv 2507.09990",
        topic="efficiency",
        sends="down: A and B, then Q [o, s] of each module; up: B_k (A Omega) [o, s] (and heads), then A^T (B_k^T Q) "
              "[i, s]",
        needs="the space lora, one rank for all; clients that remember within a round",
        claim=Claim("under DP-SGD at epsilon 3 its loss is at most FFA-LoRA's, each at its best learning rate, with "
                    "the same noise and rounds", rig="private_chain", metric="best_loss", baseline="ffa_lora",
                    relative="difference", holds="<=", threshold=0.0, options={"epsilon": 3.0}),
        also={"epsilon_1": Claim("and at epsilon 1", rig="private_chain", metric="best_loss", baseline="ffa_lora",
                                 relative="difference", holds="<=", threshold=0.0, options={"epsilon": 1.0}),
              "exact": Claim("since A is common the sketch of s = r columns loses nothing: what is deployed is the "
                             "mean of the clients' products", rig="exactness", metric="error", holds="<=",
                             threshold=1e-5, kind="exact")},
        evidence="Dossier's reading of the authors' code: there Omega is drawn once for the whole run and s = r, both "
                 "as here; a direction that the mean product lacks (all of them before anything is learned) keeps a "
                 "row of A with B = 0 there, so that it can still be learned.",
    )
    trial = Trial(rounding="the signs of an SVD are free")

    sketch: int | None = knob(None, "columns s of a sketch; None: the space's rank, which is exact", ge=1)

    def check(self, model: Any) -> None:
        rank = need_lora(self, model).rank
        if self.sketch is not None and self.sketch < rank:
            raise CompositionError(f"method.sketch = {self.sketch} and space.rank = {rank} do not fit together: fewer "
                                   f"columns cannot hold the product of B and A; it must be >= {rank}, or left out")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "seed": model.seed}

    def round(self, state: State, clients) -> Program:
        theta = state["theta"]
        first = yield Ask(self.local, {c.id: pack(theta=theta) for c in clients})
        y, there = part(first.value, "y"), first.answered
        while True:  # both sketches must be of the same clients: whoever is silent in between is left out of both
            q = {path: torch.linalg.qr(x.double()).Q.to(x) for path, x in y.items()}
            second = yield Ask(self.project, {c: pack(q=q) for c in there})
            if set(second.answered) == set(there):
                break
            again = yield Ask(self.sketch_again, {c: {} for c in second.answered})
            y, there = part(again.value, "y"), again.answered
        new = dict(theta)
        for path, p in part(second.value, "p").items():  # (sum_k p_k P_k)^T = U S V^T; B = Q U S^1/2, A = S^1/2 V^T
            b_name, a_name = names_of(path)
            new[b_name], new[a_name] = refactored(q[path], p.mT, theta[b_name], theta[a_name])
        heads = split_heads(theta)
        return {**state, "theta": new | add(heads, part(first.value, "heads"))}

    @on_client(reduce=Mean(), gives="y: tensors, heads?: tensors, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        theta = part(msg, "theta")
        fitted = client.fit(theta, freeze=["*." + A])
        client.memory["theta"] = {n: x for n, x in fitted.theta.items() if ".lora_" in n}
        heads = sub(split_heads(fitted.theta), split_heads(theta))
        return pack(y=self.sketched(client), heads=heads, n=client.n, loss=fitted.loss)

    @on_client(reduce=Mean(), gives="y: tensors, n: rows")
    def sketch_again(self, msg: Payload, client: Any) -> Payload:
        return pack(y=self.sketched(client), n=client.n)

    def sketched(self, client: Any) -> Tree:
        """B_k (A Omega) of each module."""
        mine = factors(client.memory["theta"])
        return {path: b @ (a @ self.omega(client.model, path, a)) for path, (b, a) in mine.items()}

    @on_client(reduce=Mean(), gives="p: tensors, n: rows")
    def project(self, msg: Payload, client: Any) -> Payload:
        q, mine = part(msg, "q"), factors(client.memory["theta"])
        return pack(p={path: a.mT @ (b.mT @ q[path]) for path, (b, a) in mine.items()}, n=client.n)

    def omega(self, model: Any, path: str, a: Tensor) -> Tensor:
        """[i, s], the same for all clients and rounds."""
        draw = torch_stream(model.seed, "fedask", path)
        return torch.randn(a.shape[1], self.sketch or len(a), generator=draw, dtype=torch.float64).to(a)


def refactored(q: Tensor, product: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The best B [o, r] and A [r, i] for Q product [s, i], balanced; as they were where the product is nothing."""
    u, s, vt = dense_svd(product.double())
    r = len(a)
    u, s, vt = u[:, :r], s[:r], vt[:r]
    if not float(s[0]) > 0:
        return torch.zeros_like(b), a
    root = s.clamp(min=float(s[0]) * 1e-4).sqrt()
    return (q.double() @ u * (s / root)).to(b), (root[:, None] * vt).to(a)


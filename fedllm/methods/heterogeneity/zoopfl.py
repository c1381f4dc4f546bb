"""ZooPFL: around a black box a shared encoder changes its input, and each client reads its output in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.methods import _surgery as around
from fedllm.methods._blackbox import TOLD, BlackBox, Meter, empty_ledger


@dataclass(frozen=True)
class ZooPFL(BlackBox):
    """x'_t = s([q(x_t), e_k]), logits = H_k F(x'): q is shared, s frozen once trained, e_k and H_k never leave."""

    card = Card(
        title="ZooPFL: black-box foundation models for personalized federated learning",
        paper="Lu et al., ZooPFL: Exploring Black-box Foundation Models for Personalized FL, 2023, arXiv 2310.05143",
        topic="black box: personalization",
        sends="both ways the encoder q, and the decoder s (up in the first rounds alone)",
        needs="a classification model that gives logits for token embeddings; no weights, no gradients",
        claim=Claim("at Dirichlet(0.1) own code and reading are right more often on own rows than shared, by as many "
                    "queries", rig="surgery", metric="over_shared", holds=">", threshold=0.0),
        also={"zero_shot": Claim("and more accurate than the model as it is", rig="surgery", metric="over_none",
                                 holds=">", threshold=0.0, wins=4),
              "code": Claim("differences by coordinates point where the code's gradient does (cosine)", wins=5,
                            rig="code_gradient", metric="coordinates", holds=">=", threshold=0.99),
              "directions": Claim("as many along random directions do less", rig="code_gradient", metric="nearer",
                                  holds=">", threshold=0.0, wins=5),
              "reconstruction": Claim("the first rounds halve the error of the decoded embeddings", rig="surgery",
                                      metric="left", holds="<=", threshold=0.5, wins=5)},
        evidence="from a dossier of what is remembered of the paper. Ours: q and s are affine maps of a token's "
                 "embedding, the code that is disturbed is a row's mean of q(x_t), lr_q is from seeds 100 and 101")
    trial = Trial({"pretrain_rounds": 1, "pretrain_steps": 5, "code_dim": 4, "embed_dim": 2}, task="classification")
    code_dim: int = knob(16, "m, numbers of a token's code; each costs two queries a row and step", ge=1)
    embed_dim: int = knob(4, "numbers of e_k, the client's own code; they cost as much", ge=1)
    pretrain_rounds: int = knob(3, "first rounds, in which q and s learn to give back embeddings", ge=1)
    pretrain_steps: int = knob(50, "Adam steps of such a round", ge=1)
    pretrain_lr: float = knob(0.01, "their rate", gt=0)
    steps: int = knob(2, "local steps of a round, each on a batch", ge=1)
    batch: int = knob(8, "rows of a step", ge=1)
    head_steps: int = knob(5, "steps of H_k on the outputs of a batch", ge=1)
    estimator: Literal["cge", "rge"] = knob("cge", "differences by coordinates or random ones", options=("cge", "rge"))
    h: float = knob(1e-3, "size of a difference", gt=0)
    lr_q: float = knob(0.01, "rate of q and e_k", gt=0)
    lr_head: float = knob(0.1, "rate of H_k", gt=0)
    personal: bool = knob(True, "e_k and H_k stay at the client; false: they are averaged like q, for comparison")
    seed: int = knob(0, "from which q and s start", ge=0, lt=2**32)
    serves = False

    @property
    def dim(self) -> int:
        return self.code_dim + self.embed_dim

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'zoopfl' and data.task = {model.task!r}: use data.task = 'classification'")

    def calls(self, rows: int) -> int:
        return self.steps * min(rows, self.batch) * (2 * self.dim + 1)

    def init(self, model: Any) -> State:
        self.check(model)
        rng, d, c = torch_stream(self.seed, "zoopfl"), model.words.shape[1], len(model.labels)
        draw = lambda *size: torch.randn(size, generator=rng) / size[1] ** 0.5  # noqa: E731
        theta = {"q.weight": draw(self.code_dim, d), "q.bias": torch.zeros(self.code_dim),
                 "s.weight": draw(d, self.dim), "s.bias": torch.zeros(d)}
        return {"theta": theta | ({} if self.personal else around.fresh(self.embed_dim, c)), "round": 0,
                "queries": empty_ledger()}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        if state["round"] >= self.pretrain_rounds:
            return (yield from super().round(state, clients))
        out = yield Ask(self.pretrain, {c.id: self.down(state, c) for c in clients})
        return {**self.merge(state, out), "round": state["round"] + 1}

    @on_client(reduce=Mean(), gives="theta: some, n: rows, loss?: number")
    def pretrain(self, msg: Payload, client: Client) -> Payload:
        """min ||x - s([q(x), 0])||^2 over the embeddings of the client's tokens; nothing is asked of the box."""
        x = client.model.words[torch.from_numpy(np.concatenate([r.ids for r in client.tokens])).long()].float()
        learned = {n: t.clone().requires_grad_() for n, t in part(msg, "theta").items() if n[0] in "qs"}
        client.book(**around.work(learned, len(x), self.pretrain_steps))
        zero, adam = torch.zeros(self.dim), torch.optim.Adam(learned.values(), self.pretrain_lr)
        for _ in range(self.pretrain_steps):
            adam.zero_grad()
            loss = (x - around.surgery([x], learned, zero[: self.embed_dim], zero)[0]).pow(2).sum(1).mean()
            loss.backward()
            adam.step()
        return pack(theta={n: t.detach() for n, t in learned.items()}, n=client.n, loss=float(loss.detach()))

    @on_client(reduce=Mean(), gives="theta: some, n: rows, loss?: number, " + TOLD)
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, meter, rng = around.exact(part(msg, "theta")), Meter(client), client.rng("zoopfl")
        own, rows, loss = self.own(theta, client), client.tokens, 0.0
        for _ in range(self.steps):
            batch = [rows[i] for i in rng.choice(len(rows), min(len(rows), self.batch), replace=False)]
            x, y = around.embedded(batch, client.model.words), torch.tensor([r.labels for r in batch])
            v = around.directions(self.estimator, self.dim, rng)
            moves = torch.cat([0 * v[:1], self.h * v, -self.h * v])
            texts = [t for u in moves for t in around.surgery(x, theta, own["e"], u)]
            said = meter.outputs(texts).view(len(moves), len(batch), -1)  # [1 + 2 D, rows, classes]
            own, loss = around.read(said[0], y, own, self.lr_head, self.head_steps)  # behind the box
            losses = torch.stack([around.row_losses(z, y, own) for z in said[1:]])
            dz, de = around.slopes(self.estimator, losses, v, self.h).split([self.code_dim, self.embed_dim], 1)
            # J_q^T dz, row by row: a row's code is W mean_t x_t + b
            theta["q.weight"] = theta["q.weight"] - self.lr_q * dz.T @ torch.stack([r.mean(0) for r in x]) / len(x)
            theta["q.bias"] = theta["q.bias"] - self.lr_q * dz.mean(0)
            own["e"] = own["e"] - self.lr_q * de.mean(0)
        if self.personal:
            client.memory.update(around.rounded(own))
        sent = around.rounded({n: t for n, t in theta.items() if n[0] == "q"} | ({} if self.personal else own))
        return {**pack(theta=sent, n=client.n, loss=loss), **meter.notes}

    def own(self, theta: Mapping[str, Tensor], client: Client) -> Tree:
        """This client's e and H; at first a zero and the model's own reading."""
        first = around.fresh(self.embed_dim, len(client.model.labels))
        return around.exact({n: (client.memory if self.personal else theta).get(n, t) for n, t in first.items()})

    def merge(self, state: State, out: Replies) -> State:
        return {**state, "theta": {**state["theta"], **part(out.value or {}, "theta")}}

    def report(self, state: State) -> Mapping[str, Any]:
        return {**super().report(state), "queries_per_row_and_step": 2 * self.dim + 1}

    def served(self, state: State) -> tuple[Tree, None]:
        return state["theta"], None

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        theta, rows = around.exact(part(msg, "theta")), client.encode(client.held_out(msg["on"]))
        if not rows:
            return {"n": 0}
        own, y = self.own(theta, client), torch.tensor([r.labels for r in rows])
        still = torch.zeros(self.dim).double()
        said = client.outputs(around.surgery(around.embedded(rows, client.model.words), theta, own["e"], still))
        right = float((around.remapped(said, own).argmax(1) == y).double().mean())
        return {"loss": float(around.row_losses(said, y, own).mean()), "accuracy": right, "n": len(rows)}

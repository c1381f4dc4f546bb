"""Fed-SB: between factors that rest everyone trains a small square matrix, whose average is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._linalg import dense_svd
from fedllm.spaces.lora import factors, names_of
from fedllm.spaces.lora_sb import LoRASB, core

AT_EQUAL_BYTES = {"space": {"name": "lora_sb", "rank": 7, "alpha": 7.0, "targets": ("query", "value")}}
AGAINST = {"space": {"name": "lora", "rank": 1, "alpha": 2.0, "targets": ("query", "value")}}
LR = {"local.lr": (1e-3, 3e-3, 1e-2, 3e-2)}
FACTORS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class FedSB(Star):
    """W = W_0 + s B R A is linear in R: s B (sum_k p_k R_k) A is the mean of what clients have."""

    card = Card(
        title="Fed-SB: only the r x r middle matrix travels",
        paper="Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in "
              "(Private) Federated LoRA Fine-Tuning, 2025, arXiv 2502.15436",
        topic="efficiency",
        sends="down: R (A and B once to each client); up: the change of R, r^2 a module whatever its width; at the "
              "start, where it is by gradients, r (o + i) a module once",
        needs="the space lora_sb; clients that remember",
        claim=Claim("with as many bytes a round (7 x 7 against one row of 48) it ends with a lower loss on the IID "
                    "test than FFA-LoRA, on the same work", rig="subspace", metric="global_loss", baseline="ffa_lora",
                    relative="difference", holds="<", threshold=0.0, options=AT_EQUAL_BYTES, against=AGAINST, grid=LR),
        also={"start": Claim("factors from the first gradient end lower than random ones", rig="subspace",
                             metric="global_loss", baseline="fed_sb", relative="difference", holds="<", threshold=0.0,
                             options={**AT_EQUAL_BYTES, "knobs": {"begin": "gradient"}}, grid=LR,
                             against={"knobs": {"begin": "random"}})},
        evidence="Code of LoRA-SB and a fork of Fed-SB's read by the dossier. There the start is an SVD of the sum of "
                 "gradients' signs over pooled rows; here a randomized SVD of the mean gradient in two linear asks, "
                 "each r numbers a row, so that no full gradient is sent and secure aggregation sees sums alone. "
                 "Measured, it is no better than FFA-LoRA (0.002 above) and a start by gradients no better than a "
                 "random one (0.0006 below): both open.",
    )
    only_fits = False
    trial = Trial(space={"name": "lora_sb", "rank": 4}, rounding="the signs of an SVD are free")

    begin: Literal["gradient", "random"] = knob("gradient", "A and B from the first gradient, or from the seed",
                                                options=("gradient", "random"))
    rows: int = knob(64, "training rows of a client that its first gradient is measured on, at the most", ge=1)
    first_step: float = knob(0.0, "eta_0: R begins at -eta_0 S / s, one step of descent; 0: at zero", ge=0)

    def check(self, model: Any) -> None:
        if not isinstance(model.space, LoRASB):
            raise CompositionError(f"method 'fed_sb' and space '{model.space.stem}' do not fit together: it trains the "
                                   "matrix between two resting factors; use the space 'lora_sb'")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0, "holds": {}, "s": model.space.s}

    def round(self, state: State, clients) -> Program:
        if state["round"] == 0 and self.begin == "gradient":
            q = yield Ask(self.sketch, {c.id: pack(theta=self.probe(state["theta"], "lora_B")) for c in clients})
            left = ortho(part(q.value, "g"))  # the range of G Omega, G = sum_k p_k dL_k/dW
            theta = {**state["theta"], **left}
            g = yield Ask(self.sketch, {c.id: pack(theta=self.probe(theta, "lora_A")) for c in clients})
            state = {**state, "theta": self.started(theta, part(g.value, "g"), state["s"])}
        return (yield from super().round(state, clients))

    def probe(self, theta: Tree, side: str) -> Tree:
        """With R = 1, dL/dB = s G A^T at B = 0 and dL/dA = s B^T G at A = 0: a sketch of the gradient G of W."""
        return {n: torch.zeros_like(x) if n.endswith(f"{side}.weight") else
                torch.eye(len(x), dtype=x.dtype) if n.endswith("lora_R.weight") else x for n, x in theta.items()}

    @on_client(reduce=Mean(), gives="g: tensors, n: rows")
    def sketch(self, msg, client):
        theta = part(msg, "theta")
        side = next(e for e in FACTORS if not any(x.any() for n, x in theta.items() if n.endswith(e)))
        g = client.gradient(theta, range(min(self.rows, client.n)))
        return pack(g={n: x for n, x in g.items() if n.endswith(side)}, n=client.n)

    def started(self, theta: Tree, sketch: Tree, s: float) -> Tree:
        """Q^T G = U S V^T: B = Q U and A = V^T, so B S A is the best G of rank r that the sketch knows."""
        out = dict(theta)
        for path, (b, _) in factors(theta).items():
            b_name, a_name = names_of(path)
            u, sv, vt = dense_svd(sketch[a_name].double() / s)
            out[b_name], out[a_name] = (b.double() @ u).to(b), vt.to(b)
            out[core(path)] = (-self.first_step / s * torch.diag(sv)).to(b)
        return out

    def down(self, state: State, client):
        theta = state["theta"]
        return pack(theta=moving(theta) if state["holds"].get(client.id) else theta)

    @on_client(reduce=Mean(), gives="delta: tensors, n: rows, loss?: number")
    def local(self, msg, client):
        theta = self.whole(msg, client)
        client.memory["factors"] = {n: x for n, x in theta.items() if n.endswith(FACTORS)}
        fitted = client.fit(theta, freeze=[f"*.{end}" for end in FACTORS])
        return pack(delta=moving(sub(fitted.theta, theta)), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Replies) -> State:
        # R <- sum_k p_k R_k
        theta = state["theta"] | add(moving(state["theta"]), part(out.value, "delta"))
        holds = {**state["holds"], **dict.fromkeys(out.answered, True)}
        return {**state, "theta": theta, "round": state["round"] + 1, "holds": holds}

    def whole(self, msg: Any, client: Any) -> Tree:
        """What came, with the factors that the client holds."""
        return {**client.memory.get("factors", {}), **part(msg, "theta")}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(self.whole(msg, client), on=msg["on"])


def moving(tree: Tree) -> Tree:
    """R, and the heads."""
    return {n: x for n, x in tree.items() if not n.endswith(FACTORS)}


def ortho(tree: Tree) -> Tree:
    """Orthonormal columns that span each tensor's."""
    return {n: torch.linalg.qr(x.double()).Q.to(x) for n, x in tree.items()}

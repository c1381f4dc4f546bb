"""FedEx-LoRA: average the factors, and merge into the base just what that average gets wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Tree, pack, part
from fedllm.methods._drift import grown, held, news, start
from fedllm.methods._factors import Products, need_lora, stacks, svds
from fedllm.methods._linalg import cut
from fedllm.spaces.lora import factors


@dataclass(frozen=True)
class FedExLoRA(Star):
    """FedIT made exact by a residual: R = sum_k p_k B_k A_k - B_bar A_bar goes into the frozen weights."""

    card = Card(
        title="FedEx-LoRA: exact aggregation by a residual",
        paper="Singhal, Ponkshe and Vepakomma, FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning "
              "of Foundation Models, ACL 2025, arXiv 2410.09432",
        topic="baselines",
        sends="down: A_bar, B_bar and the residual's factors, (K + 1) r (o + i) a module; up: A_k and B_k",
        needs="the space lora, one rank for all; a base that can drift",
        claim=Claim("ends with a lower loss on the IID test than FedIT under label skew, on the same work",
                    rig="label_skew", metric="global_loss", baseline="fedit", relative="ratio",
                    holds="<=", threshold=1.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        evidence="Repository of the authors read; weights p_k = n_k / n where it has 1 / K. It transposes the "
                 "residual, which is right for GPT-2's Conv1D alone; here the drift is always [out, in].",
    )
    residual_rank: int | None = knob(None, "rank to which the residual is cut by SVD; None: exact, 0: FedIT", ge=0)

    def init(self, model) -> State:
        space = need_lora(self, model)
        return {"theta": model.initial(), "scale": space.scale(space.rank), **start()}

    def down(self, state: State, client):
        return pack(theta=state["theta"]) | news(state, client.id)

    @on_client(reduce=Products(means=True), gives="theta: tree, n: rows, scale: count, loss?: number")
    def local(self, msg, client):
        space = client.model.space
        fitted = client.fit(part(msg, "theta"), base=held(client, msg))  # W <- W + s R
        return pack(theta=fitted.theta, n=client.n, scale=space.scale(space.rank), loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        theta = part(out.value, "theta")  # A_bar = sum_k p_k A_k, B_bar = sum_k p_k B_k, and the heads
        residual = self.residual(stacks(out.value), theta, state["scale"])
        return {**state, "theta": theta, **grown(state, residual, out.answered)}

    def residual(self, total: dict[str, Tensor], theta: Tree, s: float) -> dict[str, Tensor]:
        """s R for every module, as factors (multiplied out where the replies were)."""
        exact = dict(total)
        for path, (b, a) in factors(theta).items():
            if f"B/{path}" in total:  # [B_1 .. B_K, B_bar] [p_1 s A_1; ..; p_K s A_K; -s A_bar]
                exact[f"B/{path}"] = torch.cat([total[f"B/{path}"], b], 1)
                exact[f"A/{path}"] = torch.cat([total[f"A/{path}"], -s * a], 0)
            else:
                exact[f"product/{path}"] = total[f"product/{path}"] - s * (b @ a)
        if self.residual_rank is None:
            return exact
        short = {path: cut(svd, self.residual_rank) for path, svd in svds(exact).items()}
        return {f"{side}/{path}": pair[i] for path, pair in short.items() for i, side in enumerate("BA")}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return state["theta"], state["drift"] or None

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(part(msg, "theta"), base=held(client, msg), on=msg["on"])

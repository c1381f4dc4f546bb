"""FLoRA: stack everyone's factors, merge the product into the base, and start a new LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, pack, part
from fedllm.methods._drift import grown, held, news, start
from fedllm.methods._factors import Products, fresh, need_lora, split_heads, stacks


@dataclass(frozen=True)
class FloraStacking(Star):
    """Exact for clients of any rank: [B_1 .. B_K] [p_1 s_1 A_1; ..; p_K s_K A_K] = sum_k p_k s_k B_k A_k."""

    card = Card(
        title="FLoRA: aggregation by stacking",
        paper="Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank "
              "Adaptations, NeurIPS 2024, arXiv 2409.05976",
        topic="baselines",
        sends="down: the stack of last round's factors, sum_k r_k (o + i) a module (late joiners: the whole drift); "
              "up: A_k and B_k of the client's own rank",
        needs="the space lora; a base that can drift; any rank for each client",
        claim=Claim("merges clients of ranks 1, 2, 4 and 8 without error, where averaging the factors is far off",
                    rig="exactness", metric="error", holds="<=", threshold=1e-5, kind="exact"),
        also={"skew": Claim("under label skew it ends with a lower loss than FedIT on the same work, each at its best "
                            "rate", rig="label_skew", metric="global_loss", baseline="fedit",
                            relative="difference", holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        evidence="Repository of the authors read. It throws the learned factors away each round. At one untuned rate "
                 "its loss was below FedIT's on our rig in 5 of 5 seeds (0 to 4); tuned: claim `skew`.",
    )
    trial = Trial(space={"name": "lora", "rank": 8}, ranks=(1, 2, 4, 8))
    reads_ranks = True

    downlink: Literal["stack", "dense"] = knob("stack", "what clients merge: last round's factors, or the whole drift",
                                               options=("stack", "dense"))

    def init(self, model) -> State:
        need_lora(self, model)
        return {"theta": model.initial(), **start()}

    def down(self, state: State, client):
        return pack(heads=split_heads(state["theta"])) | news(state, client.id, self.downlink == "dense")

    @on_client(reduce=Products(), gives="theta: tensors, n: rows, scale: count, loss?: number")
    def local(self, msg, client):
        base = held(client, msg)  # W <- W + B* A*
        rank = client.profile.rank or client.model.space.rank
        theta = fresh(client, rank, "flora") | part(msg, "heads")  # A random, B = 0
        fitted = client.fit(theta, base=base)
        return pack(theta=fitted.theta, n=client.n, scale=client.model.space.scale(rank), loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        theta = state["theta"] | part(out.value, "theta")  # only the heads come averaged; B stays zero
        return {"theta": theta, **grown(state, stacks(out.value), out.answered)}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return state["theta"], state["drift"] or None

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {**self.down(state, c), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(part(msg, "heads"), base=held(client, msg), on=msg["on"])

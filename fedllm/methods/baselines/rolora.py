"""RoLoRA: train B while A rests, then A while B rests, so that averaging is exact and half as large."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._factors import need_lora

RESTS = {"B": "lora_A.weight", "A": "lora_B.weight"}
"""The factor that is frozen in a turn."""


@dataclass(frozen=True)
class RoLoRA(Star):
    """Alternate the factors round by round; the resting one is the same everywhere, so the mean is exact."""

    card = Card(
        title="RoLoRA: alternating the factors",
        paper="Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025, "
              "arXiv 2502.01755",
        topic="baselines",
        sends="down: the factor that changed last (both to a client that missed a round); up: the change of the "
              "factor of the turn, about half of FedIT's",
        needs="the space lora, one rank for all; clients that remember",
        claim=Claim("its average is the average of the clients' products, where averaging both factors is far off",
                    rig="exactness", metric="error", holds="<=", threshold=1e-6, kind="exact"),
        also={"skew": Claim("under label skew it ends with a lower loss than FedIT on the same work, each at its best "
                            "rate", rig="label_skew", metric="global_loss", baseline="fedit",
                            relative="difference", holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        evidence="From public notes on the paper; no code is public. Rounds begin with B, since A has no gradient "
                 "while B is zero. At one untuned rate its loss was below FedIT's on our rig in 4 of 5 "
                 "seeds (0 to 4); claim `skew` says what tuning leaves.",
    )
    period: int = knob(1, "rounds that a turn lasts", ge=1)

    def init(self, model) -> State:
        need_lora(self, model)
        return {"theta": model.initial(), "round": 0, "at": {}}

    def turn(self, t: int) -> str:
        """"B" or "A": whose turn round t is."""
        return "BA"[t // self.period % 2]

    def moving(self, tree: Tree, t: int) -> Tree:
        """The factor of round t's turn, and the heads."""
        return {n: x for n, x in tree.items() if not n.endswith(RESTS[self.turn(t)])}

    def down(self, state: State, client):
        t, theta = state["round"], state["theta"]
        current = state["at"].get(client.id) == t  # it was there in the last round, so it lacks only what that changed
        return pack(theta=self.moving(theta, t - 1) if current else theta, round=t)

    @on_client(reduce=Mean(), gives="delta: tensors, n: rows, loss?: number")
    def local(self, msg, client):
        t = msg["round"]
        theta = {**client.memory.get("theta", {}), **part(msg, "theta")}
        client.memory["theta"] = theta
        fitted = client.fit(theta, freeze=["*." + RESTS[self.turn(t)]])
        return pack(delta=self.moving(sub(fitted.theta, theta), t), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # sum_k p_k B_k A = (sum_k p_k B_k) A, and likewise for A
        t, delta = state["round"], part(out.value, "delta")
        theta = state["theta"] | add({n: state["theta"][n] for n in delta}, delta)
        return {"theta": theta, "round": t + 1, "at": {**state["at"], **dict.fromkeys(out.answered, t + 1)}}

"""ChainFed: adapters of a few blocks at a time, so that no client ever holds the graph of the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.chain import Chain, states
from fedllm.models.emulator import blocks_of
from fedllm.models.segments import segments
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.layers import block_of

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class ChainFed(Star):
    """The window [j, j + Q) moves on by one block a round, from the first block that is worth tuning to the last."""

    card = Card(
        title="ChainFed: dynamic chain optimization",
        paper="Wu et al., Beyond End-to-End: Dynamic Chain Optimization for Private LLM Adaptation on the Edge, ACL "
              "2026, arXiv 2604.06819",
        topic="parameter efficiency: memory",
        sends="once, up: a number a block; then down: adapters of the window and what else has changed since the "
              "client was last there, up: the change of the window's",
        needs="task generation; the space adapter on a network of blocks, one adapter each",
        claim=Claim("the loss through the adapters beyond the window pays: with it the whole model ends lower than "
                    "with the window's own loss alone", rig="chain", metric="loss", baseline="chainfed",
                    relative="difference", holds="<", threshold=0.0, against={"knobs": {"gpo_lambda": 0.0}}, grid=LR),
        also={"whole": Claim("it ends no higher than FedAvg of all adapters at once, on the same steps", rig="chain",
                             metric="loss", baseline="fedavg", relative="difference", holds="<=", threshold=0.0,
                             grid=LR),
              "memory": Claim("a step of a window of two of eight blocks keeps at most 3/8 of the bytes for its "
                              "backward that a step through all blocks does", rig="chain_memory", metric="share",
                              holds="<=", threshold=0.375, kind="exact")},
        evidence="From the abstract and two notes. The head rests. States are mean-pooled for CKA. Where the paper "
                 "sends the window alone, what the last window left behind is sent once too: clients would else go on "
                 "with adapters of their own that nobody averaged.",
    )
    only_fits = False
    trial = Trial({"window": 1}, space={"name": "adapter", "size": 4})

    window: int = knob(2, "Q: blocks that are trained at a time", ge=1)
    gpo_lambda: float = knob(0.2, "weight of the loss through the adapters beyond the window", ge=0)
    cka_threshold: float = knob(0.8, "T: tuning begins at the first block whose likeness (CKA) to the embeddings is "
                                "below it; 1: at the first of all", gt=0, le=1)
    rows: int = knob(32, "training rows of a client that CKA is measured on, at the most", ge=4)

    def check(self, model: Any) -> None:
        if not isinstance(model.space, Adapter) or model.task != "generation":
            raise CompositionError(f"method 'chainfed', data.task = {model.task!r} and space '{model.space.stem}' do "
                                   "not fit together: it trains adapters of a language model block by block; use "
                                   "data.task = 'generation' and the space 'adapter'")
        depth = len(blocks_of(model.net))
        if self.window > depth:
            raise RecipeError(f"ChainFed.window = {self.window} is not allowed; it must be <= {depth}, the model's "
                              "blocks")
        segments(model, list(range(depth + 1)))  # refused here where it cannot be cut

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0, "first": None, "blocks": len(blocks_of(model.net)),
                "changed": {}, "at": {}}

    def begin(self, state: State, t: int) -> int:
        """j in round t: one further each round, from the first to where the window ends at the last block, and again.
        """
        first, stops = state["first"], state["blocks"] - self.window + 1
        first = min(first, stops - 1)
        return first + t % (stops - first)

    def round(self, state: State, clients) -> Program:
        if state["first"] is None:
            seen = yield Ask(self.likeness, {c.id: pack(theta=state["theta"]) for c in clients})
            below = [b for b in range(state["blocks"]) if self.cka_threshold == 1
                     or seen.value[f"cka/{b}"] < self.cka_threshold]
            state = {**state, "first": below[0] if below else state["blocks"] - 1}
        return (yield from super().round(state, clients))

    @on_client(reduce=Mean(), gives="n: rows, *: number")
    def likeness(self, msg, client):
        theta, some = part(msg, "theta"), client.tokens[: self.rows]
        z = client.measure(theta, some, states).astype(np.float64)  # [rows, (L + 1) d]
        first, *rest = np.split(z, len(blocks_of(client.model.net)) + 1, 1)
        return {"n": client.n, **{f"cka/{b}": cka(x, first) for b, x in enumerate(rest)}}

    def down(self, state: State, client):
        j, at = self.begin(state, state["round"]), state["at"].get(client.id, -1)
        new = {b for b, t in state["changed"].items() if t > at} | set(map(str, range(j, j + self.window)))
        theta = {n: x for n, x in state["theta"].items() if str(block_of(n)) in new}
        return pack(theta=theta, j=j)

    @on_client(reduce=Mean(), gives="delta: tensors, n: rows, loss?: number")
    def local(self, msg, client):
        j = msg["j"]
        theta = {**client.model.initial(), **client.memory.get("theta", {}), **part(msg, "theta")}
        client.memory["theta"] = theta
        rest = [n for n in theta if block_of(n) not in range(j, j + self.window)]
        fitted = client.fit(theta, freeze=rest, objective=Chain(j, self.window, self.gpo_lambda))
        delta = sub(fitted.theta, theta)
        return pack(delta={n: x for n, x in delta.items() if n not in rest}, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Replies) -> State:
        delta: Tree = part(out.value, "delta")
        t = state["round"]
        changed = {**state["changed"], **{str(block_of(n)): t + 1 for n in delta}}
        theta = state["theta"] | add({n: state["theta"][n] for n in delta}, delta)
        return {**state, "theta": theta, "round": t + 1, "changed": changed,
                "at": {**state["at"], **dict.fromkeys(out.answered, t)}}

    def report(self, state: State):
        return {"first_block": state["first"], "window": self.window}


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of two sets of states [rows, d], centered: 1 where they are alike up to a rotation."""
    x, y = x - x.mean(0), y - y.mean(0)
    along = np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum())
    return float(((x.T @ y) ** 2).sum() / along) if along > 0 else 1.0

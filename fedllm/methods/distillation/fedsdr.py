"""FedSDR: one stream smooths over what is worded apart, and stays; another learns what is true, and travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._rewrite import need_generation, rewritten

LORA = {"name": "lora", "rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
TWO = {"space": {"name": "streams", "of": {"rect": LORA, "smooth": LORA}, "personal": ("smooth",)}, "wrong": 0.47}


@dataclass(frozen=True)
class FedSDR(Star):
    """W_0 + R + S_k: S_k learns the rewritten rows while R rests, then R the rows as they are while S_k rests."""

    card = Card(
        title="FedSDR: federated self-distillation with rectification",
        paper="Ren et al., FedSDR: Federated Self-Distillation with Rectification, ICML 2026, arXiv 2605.18028",
        topic="distillation",
        sends="R both ways, as FedIT; S and the rewritten responses never",
        needs="task generation; space streams with rect (shared) and smooth (personal); clients that remember",
        claim=Claim("where 47 % of the rewrites are wrong its shared model is right more often than FedSD's, on the "
                    "same steps", rig="wordings", metric="accuracy", baseline="fedsd", relative="difference",
                    holds=">", threshold=0.0, options=TWO, against={"space": LORA},
                    grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        also={"plain": Claim("but not more often than FedAvg's, which never sees a rewrite", rig="wordings",
                             metric="accuracy", baseline="fedavg", relative="difference", holds="<=", threshold=0.0,
                             better="max", options=TWO, against={"space": LORA},
                             grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        evidence="Abstract and public notes; no code yet. The shared model is W_0 + R; a client answers with S_k too.",
    )
    only_fits = False
    trial = Trial({"rewriter": "identity"}, space={"name": "streams", "of": {
        "rect": {"name": "lora", "rank": 2}, "smooth": {"name": "lora", "rank": 2}}, "personal": ("smooth",)},
        local={"steps": 2})

    rewriter: Literal["model", "field", "identity"] = knob(
        "model", "the shared model as it came first, a column of the rows, or none", options=("model", "field",
                                                                                              "identity"))
    field: str = knob("rewritten", "the column, where rewriter is 'field'")
    longest: float = knob(3.0, "a rewrite more than so many times as long as its reference is not taken", gt=0)
    max_new_tokens: int = knob(64, "tokens of a rewrite at the most", ge=1)
    smooth_share: float = knob(0.5, "share of a round's steps that smooth, rounded; 0: FedIT", ge=0, lt=1)
    reset: bool = knob(False, "begin S_k anew each round")

    def check(self, model: Any) -> None:
        need_generation("fedsdr", model)
        if {n.partition("/")[0] for n in model.initial()} != {"rect", "smooth"} or model.space.personal != ("smooth",):
            raise CompositionError(
                f"method 'fedsdr' and space '{model.space.stem}' do not fit together: it needs two streams of which "
                "smooth is personal; use space: {name: streams, of: {rect: lora, smooth: lora}, personal: [smooth]}")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": part(model.initial(), "rect")}

    def smooth(self, client: Any) -> Tree:
        """S_k, nothing (B = 0) at first."""
        return client.memory.get("smooth") or part(client.model.initial(), "smooth")

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        rect, s = part(msg, "theta"), part(client.model.initial(), "smooth") if self.reset else self.smooth(client)
        steps = client.training.count(client.n)
        own = round(self.smooth_share * steps)
        if own:
            rows = rewritten(client, pack(rect=rect), self.rewriter, self.field, self.longest, self.max_new_tokens)
            s = part(client.fit(pack(rect=rect, smooth=s), on=rows, freeze=["rect/*"], steps=own).theta, "smooth")
            client.memory["smooth"] = s
        both = pack(rect=rect, smooth=s) if own or client.memory.get("smooth") else pack(rect=rect)
        fitted = client.fit(both, freeze=["smooth/*"], steps=steps - own)
        return pack(delta=sub(part(fitted.theta, "rect"), rect), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": add(state["theta"], part(out.value, "delta"))}  # R <- R + sum_k p_k Delta R_k

    def served(self, state: State):
        return pack(rect=state["theta"]), None

    def evaluate(self, state, clients, on):
        asked = {c.id: pack(theta=state["theta"], on=on) for c in clients}
        return (yield Ask(self.score, asked))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        rect = part(msg, "theta")
        mine = pack(smooth=client.memory["smooth"]) if msg["on"] == "local" and "smooth" in client.memory else {}
        return client.score({**pack(rect=rect), **mine}, on=msg["on"])

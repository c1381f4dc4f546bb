"""FedSD: every client learns its answers as the shared model itself would word them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._rewrite import need_generation, rewritten

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedSD(Star):
    """FedAvg on rows whose responses the model that came first has rewritten, reference in hand."""

    card = Card(
        title="FedSD: federated self-distillation",
        paper="Ren et al., FedSDR: Federated Self-Distillation with Rectification, ICML 2026, arXiv 2605.18028",
        topic="distillation",
        sends="as FedAvg: the trainables; rewritten responses stay where they were made",
        needs="task generation; best a model that can follow `the same answer in your own words`",
        claim=Claim("where clients word the same answers each in its own way, one wording for all gives a lower loss "
                    "on answers in that wording than FedAvg on the clients' own", rig="wordings", metric="loss",
                    baseline="fedavg", relative="difference", holds="<", threshold=0.0, grid=LR),
        evidence="Abstract and public notes; no code yet. About 47 % of the paper's rewrites do not say what the "
                 "reference did, which `fedsdr` is there for. Measured with rewrites that rows bring (`rewriter: "
                 "field`): the small models of our rigs cannot rewrite.",
    )
    only_fits = False
    trial = Trial({"max_new_tokens": 4})

    rewriter: Literal["model", "field", "identity"] = knob(
        "model", "the shared model as it came first, a column of the rows, or none", options=("model", "field",
                                                                                              "identity"))
    field: str = knob("rewritten", "the column, where rewriter is 'field'")
    longest: float = knob(3.0, "a rewrite more than so many times as long as its reference is not taken", gt=0)
    max_new_tokens: int = knob(64, "tokens of a rewrite at the most", ge=1)

    def check(self, model: Any) -> None:
        need_generation("fedsd", model)

    def init(self, model: Any) -> State:
        self.check(model)
        return super().init(model)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        rows = rewritten(client, theta, self.rewriter, self.field, self.longest, self.max_new_tokens)
        fitted = client.fit(theta, on=rows)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

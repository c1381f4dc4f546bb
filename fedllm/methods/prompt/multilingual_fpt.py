"""Multilingual federated prompt tuning: a language a client, one prompt encoder for all, and the small ones apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._prompts import need_prompt, numbers, streams_of
from fedllm.spaces.head import Head

PROMPT = {"name": "streams", "of": {"prompt": {"name": "p_tuning", "length": 8, "hidden": 64}, "head": "head"}}
LR = {"local.lr": (3e-3, 1e-2, 3e-2)}
MOST = 1000
"""A client names no more languages."""


@dataclass(frozen=True)
class MultilingualFPT(Star):
    """h <- sum_k |D_k| / sum_j |D_j| h_k, where Enc_h makes the prompt in front of a frozen multilingual encoder."""

    card = Card(
        title="Multilingual federated prompt tuning",
        paper="Zhao et al., Breaking Physical and Linguistic Borders: Multilingual Federated Prompt Tuning for "
              "Low-Resource Languages, ICLR 2024, arXiv 2507.03003",
        topic="prompt learning: applications",
        sends="down: the prompt encoder and the class head; up: their change, the number of examples, the training "
              "loss; once: the names of its languages and how many rows of each",
        needs="task classification; space streams of p_tuning (or soft_prompt) and head; rows that name their language",
        kinds=("text",),
        claim=Claim("of six languages the one with a tenth of the rows is classified right more often than by a prompt "
                    "tuned on its own rows alone", rig="languages", metric="low_accuracy", baseline="local_only",
                    relative="difference", holds=">", threshold=0.0, options={"space": PROMPT}, grid=LR),
        also={"distance": Claim("a language gains the less over training alone the fewer words it shares with the "
                                "others (rank correlation of gain and distance over six languages)", rig="languages",
                                metric="rho", holds="<", threshold=0.0,
                                options={"space": PROMPT, "alone": True, "local": {"lr": 1e-2}}),
              "bytes": Claim("of MiniLM a reply is less than a hundredth of one with all weights", rig="minilm_bytes",
                             metric="up_share", holds="<", threshold=0.01, kind="exact",
                             options={"space": {**PROMPT, "of": {**PROMPT["of"], "prompt": {
                                 "name": "p_tuning", "length": 20, "hidden": 64}}}})},
        evidence="From summaries; the authors' repository holds a README. The encoder is PEFT's MLP. The paper's is "
                 "XLM-R; MiniLM, which the recipe takes, has read English alone.",
    )
    only_fits = False
    trial = Trial(space={"name": "streams", "of": {"prompt": {"name": "p_tuning", "length": 3, "hidden": 4},
                                                   "head": "head"}}, task="classification",
                  far={"data.fields": {"lang": "lang"}})
    metrics: ClassVar = {"low_resource_accuracy": "max", "high_resource_accuracy": "max"}

    by: str = knob("lang", "column of the rows that names their language")
    low_resource: tuple[str, ...] = knob((), "the low-resource languages; none: those with at most `low_share` of the "
                                             "mean number of rows a language")
    low_share: float = knob(0.85, "of that mean", gt=0)

    def check(self, model: Any) -> None:
        need_prompt(self, model, ("p_tuning", "soft_prompt"), ("head",))
        if model.task != "classification" or not any(isinstance(s, Head) for s in streams_of(model.space)):
            raise CompositionError(f"method 'multilingual_fpt', data.task = {model.task!r} and space "
                                   f"'{model.space.stem}' do not fit together: a class head is trained beside the "
                                   "prompt; use data.task = 'classification' and space: {name: streams, of: {prompt: "
                                   "p_tuning, head: head}}")

    def check_rows(self, labels: Any, rows: Mapping[str, Any]) -> None:
        for client, some in rows.items():
            self.spoken(client, some)

    def spoken(self, client: str, rows: Any) -> list[str]:
        """The language of each row; DataError for a row that names none."""
        if any(self.by not in row for row in rows):
            raise DataError(f"client '{client}' has rows without {self.by!r}, which says in what language they are "
                            f"(method.by); data.fields keeps a column of this name: {{{self.by}: {self.by}}}")
        return [str(row[self.by]) for row in rows]

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "of": numbers(model), "rows": {}}

    def round(self, state: State, clients) -> Program:
        rows = dict(state["rows"])
        if new := [c.id for c in clients if c.id not in rows]:
            met = yield Ask(self.enroll, {c: {} for c in new}, quorum=0)
            rows |= {c: dict(zip(met[c]["languages"], met[c]["rows"], strict=True)) for c in met}
        return (yield from super().round({**state, "rows": rows}, clients))

    def few(self, msg: Any, reply: Any) -> None:
        names = reply["languages"]
        need(len(set(names)) == len(names) == len(reply["rows"]) <= MOST and all(n >= 0 for n in reply["rows"]),
             f"'languages' names {len(names)} and 'rows' counts {len(reply['rows'])}; allowed are {MOST}, each once")

    @on_client(gives="languages: names, rows: numbers", fits=few)
    def enroll(self, msg: Any, client: Any):
        names, rows = np.unique(self.spoken(client.id, client.data), return_counts=True)
        return {"languages": names.tolist(), "rows": rows.tolist()}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Any, client: Any):
        h = part(msg, "theta")  # the prompt encoder, and the class head
        fitted = client.fit(h)
        return pack(delta=sub(fitted.theta, h), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def groups(self, state: State) -> dict[str, list[str]]:
        """The languages, `low` and `high`."""
        total: dict[str, float] = {}
        for mine in state["rows"].values():
            for name, n in mine.items():
                total[name] = total.get(name, 0) + n
        mean = sum(total.values()) / max(1, len(total))
        low = [n for n in sorted(total) if (n in self.low_resource if self.low_resource
                                            else total[n] <= self.low_share * mean)]
        return {"low": low, "high": [n for n in sorted(total) if n not in low]}

    def report(self, state: State) -> Mapping[str, Any]:
        """Which languages count as low-resource, whose rows they are, and the share of all numbers that is trained."""
        sent = sum(t.numel() for t in state["theta"].values())
        return {**self.groups(state), "rows": state["rows"], "trained": sent, "share": sent / state["of"]}

    def evaluate(self, state: State, clients, on: str) -> Program:
        told = pack(theta=state["theta"], on=on, **self.groups(state))
        return (yield Ask(self.score, {c.id: told for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Any, client: Any):
        """On the global test also the mean accuracy over the languages of either group, each language alike."""
        theta, on = part(msg, "theta"), msg["on"]
        told = client.score(theta, on=on)
        for group in ("low", "high") if on == "global" else ():
            each = [client.score(theta, on=on, only={self.by: name}) for name in msg[group]]
            if some := [s["accuracy"] for s in each if s["n"]]:
                told |= {f"{group}_resource_accuracy": float(np.mean(some))}
        return told

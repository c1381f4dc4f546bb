"""FoT: agents solve, reflect, and send what they understood as named insights; the server makes one library of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods import _library as lib
from fedllm.models import retrieval as rt

RIG = {"rig": "insights", "metric": "right"}
RULES: Mapping[str, Callable[[int, int], int]] = {
    "the first number plus the second": lambda a, b: a + b,
    "the first number minus the second": lambda a, b: a - b,
    "the first number times the second": lambda a, b: a * b,
    "the second number minus the first": lambda a, b: b - a,
    "the larger of both numbers": max, "the smaller of both numbers": min,
    "twice the first number plus the second": lambda a, b: 2 * a + b,
    "the first number": lambda a, b: a, "the second number": lambda a, b: b}
"""What the scripted solver can do, by the words in which an insight says it."""


@dataclass(frozen=True)
class FoT(Method):
    """No gradient, no example: a word that is not known is solved by what the library says of it.

    A row is a question with two numbers (`prompt`) and the right number (`response`); the solver follows the insight
    whose name is a word of the question, and without one it guesses the first number.
    """

    card = Card(
        title="FoT: federation over text, a library of insights",
        paper="Yao, Rabbani, Li, Federation over Text, arXiv 2604.16778, 2026",
        topic="agents",
        sends="up: named insights, each of a word that at least `least` questions have, with how many bore it out; "
              "down: the library; no question and no answer",
        needs="rows of two numbers and a number; a program solves, reflects and distills",
        kinds=("text",),
        claim=Claim("with the library questions of all clients' words are solved more often than with one's own "
                    "insights", **RIG, baseline="fot", relative="difference", holds=">", threshold=0.3,
                    against={"alone": True}),
        also={"pooled": Claim("and at most 0.05 less often than by one agent that solved everybody's questions", **RIG,
                              baseline="fot", relative="difference", holds=">", threshold=-0.05,
                              against={"pooled": True}),
              "permuted": Claim("with the library's names permuted it is no better than insights of one's own", **RIG,
                                baseline="fot", relative="difference", holds="<=", threshold=0.0,
                                options={"permute": True}, against={"alone": True}),
              "order": Claim("the library does not depend on the order in which insights came", rig="insights",
                             metric="order", holds="<=", threshold=0.0, kind="exact")},
        evidence="From a dossier that read the released code. There two calls of a model write the library from all "
                 "traces, unchecked; here a program does, an insight is checked against the answers before it leaves, "
                 "and each has its clients' names, so that one can be taken out again.",
    )
    trial = Trial(far={"data.fields": {"prompt": "rule_prompt", "response": "rule_response"}},
                  apart="its insights are text and it trains nothing; tests/methods/test_fot tries it")
    metrics: ClassVar = {"right": "max"}
    serves, only_fits, mixes = False, False, "text"

    least: int = knob(3, "questions that have to bear an insight out", ge=1)
    sure: float = knob(0.75, "share of a word's questions that its rule must solve", gt=0, le=1)
    shortest: int = knob(20, "characters of an insight; shorter ones are left out", ge=1, le=200)
    size: int | None = knob(None, "most insights of the library; None: int(10 log10(max(10, n)) + 1) of n that came",
                            ge=1)
    share: Literal["insights", "nothing"] = knob("insights", "nothing: each client keeps its own, for comparison",
                                                 options=("insights", "nothing"))

    def init(self, model: Any) -> State:
        return {"theta": {}, "library": []}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        out = yield Ask(self.reflect, {c.id: self.down(state) for c in clients})
        new = [(e, n) for c, r in out.items() for e, n in zip(lib.received(c, r), r["support"], strict=True)]
        old = [(lib.Entry(e["name"], e["text"], c), n) for e in state["library"]
               for c, n in e["by"].items() if c not in out]
        return {**state, "library": self.distilled([*old, *new])}

    def down(self, state: State) -> Payload:
        return {"names": [e["name"] for e in state["library"]], "texts": [e["text"] for e in state["library"]]}

    def fits(self, msg: Payload, reply: Payload) -> None:
        lib.check_sent(self, msg, reply)
        lib.aligned(reply, ("names", "support"))

    @on_client(gives="names: names, texts: texts, support: numbers", fits=fits)
    def reflect(self, msg: Payload, client: Client) -> Payload:
        mine = self.insights(client.data)
        client.memory["own"] = [[e.name, e.text] for e, _ in mine]
        mine = mine if self.share == "insights" else []
        return {**lib.sent([e for e, _ in mine]), "support": [float(n) for _, n in mine]}

    def insights(self, rows: Sequence[Any]) -> list[tuple[lib.Entry, int]]:
        """Of every word that several questions have: the rule that solves most of them, if it solves enough."""
        found = []
        for word in lib.shared_words([r["prompt"] for r in rows], self.least):
            about = [r for r in rows if word in rt.words(r["prompt"])]
            solved = {text: sum(solve(r["prompt"], text) == r["response"] for r in about) for text in RULES}
            text = max(RULES, key=lambda t: solved[t])
            said = f"{word} means {text}"
            if solved[text] >= max(self.least, self.sure * len(about)) and len(said) >= self.shortest:
                found.append((lib.Entry(word, said), solved[text]))
        return found

    def distilled(self, came: Sequence[tuple[lib.Entry, float]]) -> list[dict[str, Any]]:
        """One insight a name, the best borne out, and of those the best borne out; a function of the set alone."""
        worth: dict[tuple[str, str], dict[str, float]] = {}
        for e, n in came:
            worth.setdefault((e.name, e.text), {})[e.client] = n
        ordered = sorted(worth, key=lambda k: (-sum(worth[k].values()), k))
        first = {name: (name, text) for name, text in reversed(ordered)}
        most = self.size or int(10 * math.log10(max(10, len(came))) + 1)
        kept = [k for k in ordered if first[k[0]] == k][:most]
        return [{"name": n, "text": t, "by": dict(sorted(worth[n, t].items()))} for n, t in kept]

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: {**self.down(state), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        rows = client.held_out(msg["on"])
        own = {n: t for n, t in client.memory.get("own", [])}
        known = dict(zip(msg["names"], msg["texts"], strict=True)) if self.share == "insights" else own
        if not rows:
            return {"n": 0}
        return {"n": len(rows), "right": float(np.mean([answered(r["prompt"], known) == r["response"] for r in rows]))}


def solve(question: str, rule: str) -> str:
    """What a rule makes of the question's two numbers; empty where it has fewer, or the rule is none."""
    numbers = [int(w) for w in rt.words(question) if w.isdecimal()][:2]
    return str(RULES[rule](*numbers)) if len(numbers) == 2 and rule in RULES else ""


def answered(question: str, library: Mapping[str, str]) -> str:
    """By the first insight whose name the question has: its rule is looked up among those that the solver can do, and
    a text that says anything else is no rule."""
    said = next((library[w] for w in rt.words(question) if w in library), "the first number")
    return solve(question, said.partition(" means ")[2] or said)

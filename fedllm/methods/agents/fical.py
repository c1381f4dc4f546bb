"""FICAL: agents teach each other their tools by short entries of text, and read those that fit a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import DataError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods import _library as lib
from fedllm.models import retrieval as rt

RIG = {"rig": "toolbook", "metric": "right"}


@dataclass(frozen=True)
class FICAL(Method):
    """Every client writes an entry on each of its tools; the sum of entries is all that anybody has to know.

    A training row is a call that worked: what was asked (`prompt`) and the call (`response`), whose first word is the
    tool. A test row is a question and the call that answers it.
    """

    card = Card(
        title="FICAL: federated in-context learning of tools by knowledge compendiums",
        paper="Wu, Li, Nan, Wang, Federated In-Context LLM Agent Learning, arXiv 2412.08054, 2024",
        topic="agents",
        sends="up: of each tool its name, WORDS that at least `least` of its questions have, and the form of its call "
              "with placeholders for values; down: everybody's entries; no question, value or outcome of one",
        needs="rows that are calls: prompt, and response that begins with the tool's name; the extra `rag` for BM25",
        kinds=("text",),
        claim=Claim("with everybody's entries the right tool is called more often than with one's own", **RIG,
                    baseline="fical", relative="difference", holds=">", threshold=0.3, against={"alone": True}),
        also={"pooled": Claim("and at most 0.05 less often than by one agent that made everybody's calls", **RIG,
                              baseline="fical", relative="difference", holds=">", threshold=-0.05,
                              against={"pooled": True}),
              "permuted": Claim("with the entries' names permuted at equal length it is right in at most 0.25",
                                rig="toolbook", metric="permuted", holds="<=", threshold=0.25),
              "retrieval": Claim("reading the entries that fit is right more often, by 0.3, than reading as many from "
                                 "the top of the list", rig="toolbook", metric="over_first", holds=">=", threshold=0.3),
              "secrets": Claim("of twenty secrets planted in questions none is in an entry", rig="toolbook",
                               metric="secrets", holds="<=", threshold=0.0, kind="exact")},
        evidence="Written from a dossier of an abstract and a third party's notes. Entries are written, and tools "
                 "chosen, by a program and not by a language model: what is claimed is what the entries are worth.",
    )
    trial = Trial(far={"data.fields": {"prompt": "call_prompt", "response": "call_response"}},
                  apart="its entries are text and it trains nothing; tests/methods/test_fical tries it")
    metrics: ClassVar = {"right": "max", "recall": "max"}
    serves, only_fits, mixes = False, False, "text"

    by: Literal["bm25", "tfidf", "minilm"] = knob("bm25", "how entries are found", options=("bm25", "tfidf", "minilm"))
    top_k: int = knob(3, "entries that are read for a question", ge=1, le=20)
    find: Literal["best", "first"] = knob("best", "read those that fit best, or the first of the list, for comparison",
                                          options=("best", "first"))
    least: int = knob(2, "questions of a tool that must have a word for it to leave", ge=1)
    words: int = knob(12, "words of an entry", ge=1, le=40)
    alike: float = knob(0.92, "share of words by which two entries of one tool are one", gt=0, le=1)
    share: Literal["entries", "nothing"] = knob("entries", "nothing: each client reads its own, for comparison",
                                                options=("entries", "nothing"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "bm25":
            rt.lexical()

    def check_rows(self, labels: Sequence[str], rows: Any) -> None:
        if found := next((c for c, some in rows.items() if any(not r.get("response", "").split() for r in some)), None):
            raise DataError(f"method 'fical' learns from calls, and client '{found}' has a row whose response names no "
                            "tool; the first word of a response is the tool")

    def init(self, model: Any) -> State:
        return {"theta": {}, "entries": []}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        """Compendiums come in; everybody's entries, each of one name and wording once, are the next one."""
        out = yield Ask(self.write, {c.id: {} for c in clients})
        new = [e for c, reply in out.items() for e in lib.received(c, reply)]
        old = [lib.Entry(**e) for e in state["entries"] if e["client"] not in out]
        return {**state, "entries": lib.stored(lib.united([*old, *new], self.alike))}

    @on_client(gives="names: names, texts: texts", fits=lib.check_sent)
    def write(self, msg: Payload, client: Client) -> Payload:
        mine = self.entries(client.data)
        client.memory["own"] = [[e.name, e.text] for e in mine]
        return lib.sent(mine if self.share == "entries" else [])

    def entries(self, calls: Sequence[Any]) -> list[lib.Entry]:
        """What there is to say of each tool: what it is for, and how it is called."""
        tools: dict[str, list[Any]] = {}
        for row in calls:
            tools.setdefault(row["response"].split()[0], []).append(row)
        return [lib.Entry(name, self.entry(name, rows)) for name, rows in sorted(tools.items())]

    def entry(self, name: str, rows: Sequence[Any]) -> str:
        """Only words that several questions have, and placeholders in the place of what a call takes from its own."""
        known = lib.shared_words([r["prompt"] for r in rows], self.least)[: self.words]
        forms = [" ".join(w if w in known else lib.masked(w) if "<" in lib.masked(w) else "<word>"
                          for w in r["response"].split()[1:]) for r in rows]
        form = max(sorted(set(forms)), key=forms.count)
        return f"{' '.join(name.split('_'))}: {' '.join(known)}. call: {name} {form}"[: lib.ENTRY]

    def answer(self, query: str, clients: Sequence[Any], state: State | None = None) -> Program:
        """The name of the tool to call; an entry is looked up and never obeyed, whatever it says."""
        if state is None:
            state = yield from self.round(self.init(None), clients)
        found = self.found(query, [lib.Entry(**e) for e in state["entries"]])
        return rt.Found(query, found[0].name if found else None,
                        tuple(rt.Passage(e.name, (e.client,), 0.0, e.text) for e in found))

    def found(self, query: str, entries: Sequence[lib.Entry]) -> list[lib.Entry]:
        """The entries that are read, the one that fits best first."""
        some = entries if self.find == "best" else entries[: self.top_k]
        return [some[i] for i, _ in lib.ranked(lib.masked(query), [e.text for e in some], self.by)[: self.top_k]]

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        msg = lib.sent([lib.Entry(**e) for e in state["entries"]]) | {"on": on}
        return (yield Ask(self.score, {c.id: msg for c in clients}))

    def examine(self, state: State, clients: Sequence[Any], rows: Sequence[Any]) -> Program:
        """The clients' mean on the global test."""
        got = [r for r in (yield from self.evaluate(state, clients, "global")).values() if r["n"]]
        if not got:
            return dict.fromkeys(self.metrics, 0.0)
        return {m: float(np.mean([r[m] for r in got])) for m in got[0] if m != "n"}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """How often the right tool is called, and how often it is among the entries that are read."""
        rows = client.held_out(msg["on"])
        known = lib.received("", msg) if self.share == "entries" else [
            lib.Entry(n, t) for n, t in client.memory.get("own", [])]
        if not rows:
            return {"n": 0}
        got = [[e.name for e in self.found(r["prompt"], known)] for r in rows]
        want = [r["response"].split()[0] for r in rows]
        return {"n": len(rows), "right": float(np.mean([g[:1] == [w] for g, w in zip(got, want, strict=True)])),
                "recall": float(np.mean([w in g for g, w in zip(got, want, strict=True)]))}

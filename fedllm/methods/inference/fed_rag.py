"""Federated retrieval: sites index their own documents, answer a query with their best few, and the server merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.local.text import LocalText, room
from fedllm.methods._search import Searching
from fedllm.models import reading
from fedllm.models import retrieval as rt
from fedllm.models.model import Model

DEPTH = 10  # of the lists that are graded: ndcg10, recall10


@dataclass(frozen=True)
class FedRAG(Searching):
    """Every site that is asked ranks its own documents; one list is made of theirs, of which the first are read.

    A training row is a document (`text`, or `prompt` and `response`; `id` where it has one). A test row is a query
    (`text` or `prompt`) with the ids of documents that answer it (`relevant`: a list, or ids and grades).
    """

    card = Card(
        title="FedRAG: federated search, and generation from what it finds",
        paper="Wang, Khramtsova, Zhuang, Zuccon, FeB4RAG: Evaluating Federated Search in the Context of Retrieval "
              "Augmented Generation, SIGIR 2024, arXiv 2402.11891",
        topic="inference: retrieval",
        sends="down: the text of each query, and where vectors are used its vector; up, as the site's profile says in "
              "`shares`: numbers and scores of its best `top_k` documents, mean and deviation of all its scores "
              "(scores), their ids (ids), and the first `snippet` characters of their TEXT, of all or of those that "
              "are read (snippets), or nothing but noisy counts of documents by their cosine (counts); once, where "
              "sites are chosen: `sample` vectors of documents, or `centers` means",
        needs="rows that are documents; for generation a text model at the server; the extra `rag` for BM25 and PDF",
        kinds=("text",),
        claim=Claim("the merged list holds more of the wanted documents than a site finds among its own",
                    rig="federated_search", metric="recall_gain", holds=">", threshold=0.3, wins=5),
        evidence="Written from a dossier. Where no document is held twice, RRF is round-robin under another name. "
                 "Vectors of documents can be turned back into much of their words: a site that shares scores alone "
                 "gives none, and is then asked every time.",
        also={"zscore": Claim("normalized scores rank the wanted document higher than ranks alone (nDCG@10)",
                              rig="federated_search", metric="zscore_over_rrf", holds=">", threshold=0.05, wins=5),
              "route": Claim("ReDDE sends a query first to the site that holds its document at least twice as often as "
                             "chance, over eight packages' docstrings", rig="federated_packages",
                             metric="redde_over_chance", holds=">=", threshold=2.0),
              "selected": Claim("three chosen sites of eight and normalized scores rank higher (nDCG@10) than "
                                "round-robin over all, with at most half of the passages moved",
                                rig="federated_packages", metric="selected_over_naive", holds=">", threshold=0.0),
              "scores_tell": Claim("whoever may ask 16 times finds the secret of a canary by scores alone, more often "
                                   "than not", rig="what_answers_tell", metric="found_scores", holds=">",
                                   threshold=0.5),
              "counts": Claim("from counts with noise of deviation 4 it finds it in fewer than one case in five "
                              "(chance is one in sixteen)", rig="what_answers_tell", metric="found_counts", holds="<",
                              threshold=0.2),
              "rerank": Claim("cosines of one encoder over the three chosen sites' lists rank higher than normalized "
                              "scores", rig="federated_packages", metric="rerank_over_minmax", holds=">",
                              threshold=0.0)},
    )
    trial = Trial(apart="it answers questions and has no rounds")
    metrics: ClassVar = {"ndcg10": "max", "recall10": "max"}
    serves = False
    read: int = knob(3, "passages that the server's model reads, where it writes the answer", ge=1)
    generate: bool = knob(False, "let the server's model write the answer; false: the best passage is the answer")
    writer: str = knob("", "name of the recipe's model that writes, at the server alone; '': the main model")
    max_new_tokens: int = knob(48, "longest generated answer", ge=1)

    def server_asks_for(self) -> Sequence[str]:
        return (self.writer,) if self.writer else ()

    def check(self, model: Any) -> None:
        if self.generate and not self.writer:
            need_speech("the main model", model)

    def check_named(self, main: Any, models: Mapping[str, Any]) -> None:
        if self.generate and self.writer:
            need_speech(f"models.{self.writer}", models[self.writer])

    def answer(self, query: str, clients, state: State | None = None) -> Program:
        wanted = self.read if self.generate else 1
        [(found, asked, near)] = yield from self.search([query], clients, state, wanted, self.wait)
        found = found[:wanted]
        some = {c: n for c, n in near.items() if n > 0}
        if not found:
            told = "; ".join(f"{c} has about {n:.0f} documents close to the question, and shares no more of them"
                             for c, n in some.items())
            return rt.Found(query, told or None, asked=asked, near=near)
        readable = [p for p in found if p.text]
        if not readable:
            held = ", ".join(sorted({c for p in found for c in p.clients}))
            return rt.Found(query, f"What matches lies at {held}, and its text stays there [1]", tuple(found), (1,),
                            asked=asked, near=near)
        if not self.generate:
            return rt.Found(query, f"{readable[0].text} [1]", (readable[0],), (1,), asked=asked,
                            near=near)
        out = yield Ask(self.write, {SERVER: {"question": query, "passages": [p.text for p in readable]}})
        told = out[SERVER]
        shown = [(p, t) for p, t in zip(readable, told["read"], strict=True) if t]
        said, cited = reading.cited(told["text"], [t for _, t in shown])
        return rt.Found(query, said or None, tuple(p for p, _ in shown), cited, told["left_out"], asked,
                        near)

    @on_client(gives="text: text, read: texts, left_out: count")
    def write(self, msg: Payload, client: Client) -> Payload:
        """The server's model answers from the passages: it is shown what of them tells it nothing to do, and as many as
        fit, the first first."""
        teller = client.holding(self.writer) if self.writer else client
        ours = teller.model if isinstance(teller.model, Model) else None
        marks = ours.tokenizer.all_special_tokens if ours else ()
        shown = [reading.shown(p, marks) for p in msg["passages"]]
        read, left_out = [s.text for s in shown], sum(s.left_out for s in shown)
        asked = reading.unmarked(msg["question"], marks)
        most = room(ours, self.max_new_tokens) if ours else None
        while any(read):
            prompt = reading.question_about(asked, [t for t in read if t])
            if ours and ours.tokenizer.chat_template:
                prompt = LocalText(ours).chat_prompt([{"role": "user", "content": prompt}])
            elif ours:
                prompt += "\nAnswer:"
            if most is None or len(ours.tokenizer(prompt)["input_ids"]) < most:
                [said] = teller.complete([prompt], self.max_new_tokens, 0.0, 0)
                return {"text": said.text.strip(), "read": read, "left_out": left_out}
            read[max(i for i, t in enumerate(read) if t)] = ""
            if not any(read):
                raise RecipeError(f"the question and one passage take more than the {most} tokens that the writer "
                                  "reads; ask more briefly, or lower method.snippet or method.max_new_tokens")
        return {"text": "", "read": read, "left_out": left_out}

    def examine(self, state: State, clients, rows) -> Program:
        """How high the wanted documents stand, over queries that say which are wanted; no text is sent for it."""
        got = yield from self.figures(state, clients, rows, DEPTH)
        if not got:
            raise DataError("method 'fed_rag' is tested on rows with a column 'relevant' (ids of documents), and no "
                            "row of the global test has one; map it by data.fields, or set data.test = 0.0")
        return dict(zip(self.metrics, np.mean(got, 0).tolist(), strict=True)) | {"n": len(got)}


def need_speech(name: str, model: Any) -> None:
    """CompositionError for a model that continues no text."""
    if isinstance(model, Model) and (model.rules.net != "causal" or model.silent):
        raise CompositionError(f"method.generate: {name} is there for {model.task} and writes no answer; name one that "
                               "does in method.writer, as in models: {w: {name: smollm2, task: generation}}")

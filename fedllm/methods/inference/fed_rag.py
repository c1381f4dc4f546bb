"""Federated retrieval: sites index their own documents, answer a query with their best few, and the server merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import DataError
from fedllm.core.form import aligned, need
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods.asking import Asking
from fedllm.models import retrieval as rt

DEPTH = 10  # of the lists that are graded: ndcg10, recall10


@dataclass(frozen=True)
class FedRAG(Asking):
    """Every site ranks its own documents; ranks or normalized scores make one list, of which the first are read.

    A training row is a document (`text`, or `prompt` and `response`; `id` where it has one). A test row is a query
    (`prompt`) with the ids of documents that answer it (`relevant`: a list, or ids and grades).
    """

    card = Card(
        title="FedRAG: federated search, and generation from what it finds",
        paper="Wang, Khramtsova, Zhuang, Zuccon, FeB4RAG: Evaluating Federated Search in the Context of Retrieval "
              "Augmented Generation, SIGIR 2024, arXiv 2402.11891",
        topic="inference: retrieval",
        sends="down: the text of each query; up: ids and scores of its best `top_k` documents, mean and deviation of "
              "all its scores, and the first `snippet` characters of their TEXT: of all, or of those that are read",
        needs="rows that are documents; for generation a text model at the server; the extra `rag` for BM25",
        kinds=("text",),
        claim=Claim("the merged list holds more of the wanted documents than a site finds among its own",
                    rig="federated_search", metric="recall_gain", holds=">", threshold=0.3, wins=5),
        evidence="Written from a dossier. Selection of sites and re-ranking are not here. Where no document is held "
                 "twice, RRF is round-robin under another name.",
        also={"zscore": Claim("normalized scores rank the wanted document higher than ranks alone (nDCG@10)",
                              rig="federated_search", metric="zscore_over_rrf", holds=">", threshold=0.05, wins=5)},
    )
    trial = Trial(apart="it answers questions and has no rounds")
    metrics: ClassVar = {"ndcg10": "max", "recall10": "max"}
    serves = False
    rank_by: Literal["bm25", "vectors"] = knob("bm25", "how a site ranks: by words, or by vectors of the run's model",
                                               options=("bm25", "vectors"))
    vectors_at: tuple[str, ...] = knob((), "sites that rank by vectors whatever `rank_by` says")
    top_k: int = knob(10, "documents that each site answers with", ge=1)
    merge_by: Literal["rrf", "zscore"] = knob("zscore", "one list from many: by ranks, or by normalized scores",
                                              options=("rrf", "zscore"))
    rrf_k: int = knob(60, "rrf: 1 / (k + rank)", ge=1)
    text: Literal["all", "picked"] = knob("all", "whose text is sent: every document found, or those that are read",
                                          options=("all", "picked"))
    snippet: int = knob(400, "characters of a document that may leave its site", ge=1)
    read: int = knob(3, "passages that the server's model reads, where it writes the answer", ge=1)
    generate: bool = knob(False, "let the server's model write the answer; false: the best passage is the answer")
    max_new_tokens: int = knob(48, "longest generated answer", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_by == "bm25":
            rt.lexical()

    @property
    def wanted(self) -> int:
        """Passages that the answer rests on."""
        return self.read if self.generate else 1

    def init(self, model: Any) -> State:
        return {"theta": {}, "documents": {}}

    def round(self, state: State, clients) -> Program:
        """Every site builds its index, which stays in its memory; the server learns how many documents it has."""
        out = yield Ask(self.index, {c.id: {} for c in clients})
        return {**state, "documents": {**state["documents"], **{c: r["documents"] for c, r in out.items()}}}

    def answer(self, query: str, clients, state: State | None = None) -> Program:
        found = (yield from self.search(query, clients))[: self.wanted]
        if not found:
            return rt.Found(query, None)
        if not self.generate:
            return rt.Found(query, f"{found[0].text} [1]", tuple(found))
        shown = "".join(f"[{i}] {p.text}\n" for i, p in enumerate(found, 1))
        [said] = yield from self.say([f"{shown}Question: {query}\nAnswer:"], [SERVER], self.max_new_tokens)
        cites = "".join(f"[{i}]" for i in range(1, len(found) + 1))
        return rt.Found(query, f"{said.text.strip()} {cites}", tuple(found))

    def search(self, query: str, clients, texts: bool = True) -> Program:
        """The merged list of `Passage`s, the best first; a site that is silent is left out."""
        msg = {"query": query, "k": self.top_k, "text": texts and self.text == "all"}
        out = yield Ask(self.lookup, {c.id: msg for c in clients}, quorum=0)
        lists = {c: list(zip(r["ids"], r["scores"], strict=True)) for c, r in out.items()}
        said = {i: t for r in out.values() for i, t in zip(r["ids"], r["texts"], strict=False)}
        merged = rt.merge(lists, self.merge_by, self.rrf_k, {c: (r["mean"], r["deviation"]) for c, r in out.items()})
        if texts and self.text == "picked":
            wanted = {c: [d for d, _, at in merged[: self.wanted] if at[0] == c] for c in lists}
            out = yield Ask(self.fetch, {c: {"ids": ids} for c, ids in wanted.items() if ids}, quorum=0)
            said = {i: t for c, r in out.items() for i, t in zip(wanted[c], r["texts"], strict=False)}
        return [rt.Passage(d, at, worth, said.get(d, "")) for d, worth, at in merged]

    def examine(self, state: State, clients, rows) -> Program:
        """How high the wanted documents stand, over queries that say which are wanted; no text is sent for it."""
        got = []
        for row in rows:
            if grades := rt.relevant(row):
                ids = [p.id for p in (yield from self.search(row["prompt"], clients, texts=False))]
                got.append((rt.ndcg(ids, grades, DEPTH), rt.recall(ids, grades, DEPTH)))
        if not got:
            raise DataError("method 'fed_rag' is tested on rows with a column 'relevant' (ids of documents), and no "
                            "row of the global test has one; map it by data.fields, or set data.test = 0.0")
        return dict(zip(self.metrics, np.mean(got, 0).tolist(), strict=True)) | {"n": len(got)}

    @on_client(gives="documents: count")
    def index(self, msg: Payload, client: Client) -> Payload:
        texts = [rt.document(r) for r in client.data]
        if self.rank_by == "vectors" or client.id in self.vectors_at:
            client.memory["vectors"] = torch.from_numpy(np.asarray(client.embed(texts)))  # [documents, d]
        else:
            client.memory["bm25"], client.memory["words"] = rt.bm25_index(texts)
        return {"documents": len(texts)}

    def fits(self, msg: Payload, reply: Payload) -> None:
        aligned(reply, ("ids", "scores"))
        need(len(reply["ids"]) <= msg["k"], f"'ids' names {len(reply['ids'])} documents, allowed are {msg['k']}")
        need(len(reply["texts"]) in (0, len(reply["ids"])), "'texts' has another length than 'ids'")

    @on_client(gives="ids: names, scores: numbers, mean: number, deviation: number, texts: texts", fits=fits)
    def lookup(self, msg: Payload, client: Client) -> Payload:
        if "vectors" not in client.memory and "bm25" not in client.memory:
            self.index({}, client)  # no round went before: the index is this question's alone
        rows, query = client.data, msg["query"]
        if (x := client.memory.get("vectors")) is not None:
            q = torch.from_numpy(np.asarray(client.embed([query])))
            score = torch.cosine_similarity(x, q).double().numpy()  # [documents]
        else:
            score = rt.bm25_scores(client.memory["bm25"], client.memory["words"], len(rows), query)
        best = [int(i) for i in np.argsort(-score, kind="stable")[: msg["k"]] if score[i] > 0]
        return {"ids": [rt.name(rows[i], client.id, i) for i in best], "scores": [float(score[i]) for i in best],
                "mean": float(score.mean()), "deviation": float(score.std()),
                "texts": [rt.document(rows[i])[: self.snippet] for i in best] if msg["text"] else []}

    @on_client(gives="texts: texts", fits=lambda self, msg, reply: aligned(reply, ("texts",), len(msg["ids"])))
    def fetch(self, msg: Payload, client: Client) -> Payload:
        texts = {rt.name(r, client.id, i): rt.document(r)[: self.snippet] for i, r in enumerate(client.data)}
        return {"texts": [texts.get(i, "") for i in msg["ids"]]}

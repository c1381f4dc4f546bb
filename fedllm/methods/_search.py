"""Federated search: each site's index and what it answers, the choice of sites for a query, and one list of theirs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client, Query
from fedllm.core.form import aligned, need
from fedllm.core.method import State, knob
from fedllm.core.payload import Payload
from fedllm.methods.asking import Asking
from fedllm.models import indexing, routing
from fedllm.models import retrieval as rt
from fedllm.privacy._discrete import Coins, discrete_gaussian
from fedllm.privacy.accountant import Release

EDGES, CLOSE = (0.3, 0.4, 0.5, 0.6, 0.8, 0.97), 0.5
"""Cosines at which counts begin, and from which a document is close."""
AT_ONCE = 32
"""Queries of a test that are under way side by side."""


@dataclass(frozen=True)
class Searching(Asking):
    """Sites index their documents in their memories, and answer queries as their profiles' `shares` say."""

    shares: ClassVar = True
    rows_change: ClassVar = True
    rank_by: Literal["bm25", "vectors", "both"] = knob(
        "bm25", "how a site ranks: by words, by vectors, or by the sum of both, each normalized over its documents",
        options=("bm25", "vectors", "both"))
    vectors_at: tuple[str, ...] = knob((), "sites that rank by vectors whatever `rank_by` says")
    encoder: str = knob("", "name of the recipe's model (`models:`) that makes vectors; '': each site's own")
    least: float = knob(0.0, "vectors: a document is found if its cosine to the query is above this", ge=-1, lt=1)
    top_k: int = knob(10, "documents that each site answers with", ge=1)
    select_by: Literal["all", "redde", "centroids", "learned"] = knob(
        "all", "which sites a query goes to: all, or by samples of their vectors (ReDDE), by their centroids, or by a "
        "linear map learned from the samples", options=("all", "redde", "centroids", "learned"))
    top_sites: int = knob(3, "sites that a query goes to, where they are chosen", ge=1)
    sample: int = knob(30, "redde, learned: vectors of documents that a site gives, drawn at random", ge=1)
    centers: int = knob(1, "centroids: means of vectors that a site gives", ge=1)
    merge_by: Literal["rrf", "zscore", "minmax", "cori", "round_robin", "rerank"] = knob(
        "zscore", "one list from many: by ranks, by normalized scores (over all documents, or over the list), by the "
        "latter and the site's value, in turn, or by cosines to the query under one encoder", options=rt.WAYS)
    shared_ids: bool = knob(False, "equal ids at two sites are one document (numbers that all know); false: two sites "
                                   "may call two documents alike")
    rrf_k: int = knob(60, "rrf: 1 / (k + rank)", ge=1)
    text: Literal["all", "picked"] = knob("all", "whose text is sent: every document found, or those that are read",
                                          options=("all", "picked"))
    snippet: int = knob(400, "characters of a document that may leave its site", ge=1)
    noise_multiplier: float = knob(4.0, "shares counts: deviation of the (discrete Gaussian) noise on each count, of "
                                        "which one document moves one by one", gt=0)
    wait: float = knob(10.0, "seconds that a site may take to answer a question, which then goes on without it", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_by != "vectors":
            rt.lexical()

    @property
    def noise_of_counts(self) -> float | None:
        return self.noise_multiplier

    def asks_for(self) -> Sequence[str]:
        return (self.encoder,) if self.encoder else ()

    @property
    def embeds(self) -> bool:
        """Whether anything is a vector here."""
        chosen = self.select_by != "all" or self.merge_by == "rerank"
        return chosen or self.rank_by != "bm25" or bool(self.vectors_at)

    def init(self, model: Any) -> State:
        return {"theta": {}, "documents": {}}

    def round(self, state: State, clients) -> Program:
        """Every site makes its index or brings it up to date; the server learns how many documents each has, and what
        it needs to choose among them."""
        msg = {"sample": self.sample * (self.select_by in ("redde", "learned")),
               "centers": self.centers * (self.select_by == "centroids")}
        out = yield Ask(self.index, {c.id: msg for c in clients})
        counts = {**state["documents"], **{c: r["documents"] for c, r in out.items()}}
        samples = {**state.get("samples", {}), **{c: r["sample"] for c, r in out.items() if "sample" in r}}
        if not samples:
            return {**state, "documents": counts}
        width = statistics.mode(x.shape[1] for x in samples.values())  # another encoder's vectors say nothing here
        samples = {c: x for c, x in samples.items() if x.shape[1] == width}
        chart = {"map": routing.of_samples(samples)} if self.select_by == "learned" else {}
        return {**state, "documents": counts, "samples": samples, **chart}

    def search(self, queries: Sequence[str], clients, state: State | None, texts: int = 0, wait: float | None = None
               ) -> Program:
        """For each query the merged list of `Passage`s, the best first, the sites that were asked, and what those say
        that share counts alone (about how many documents are close). The first `texts` passages come with their text,
        where their sites give it; a site that is silent for `wait` seconds (None: as long as the engine waits) is left
        out."""
        vectors = (yield from self._vectors(queries)) if self.embeds else None
        asks, went, values = [], [], []
        for i, query in enumerate(queries):
            value = {} if vectors is None else self._values(vectors[i], state)
            known = routing.best({c.id: value[c.id] for c in clients if c.id in value}, self.top_sites)
            went.append([c.id for c in clients if c.id in known or c.id not in value])
            values.append(value)
            msg = {"query": query, "k": self.top_k, "text": bool(texts) and self.text == "all",
                   **({} if vectors is None else {"vector": vectors[i]})}
            asks.append(Ask(self.lookup, dict.fromkeys(went[-1], msg), quorum=0, deadline=wait))
        outs = yield asks
        found = [self._merged(out, value) for out, value in zip(outs, values, strict=True)]
        if texts and self.text == "picked":
            for i, one in enumerate(found):
                found[i] = [*(yield from self._fetched(one[:texts], wait)), *one[texts:]]
        near = [{c: self._close(r["counts"]) for c, r in out.items() if r["counts"]} for out in outs]
        return [(passages, tuple(sites), about) for passages, sites, about in zip(found, went, near, strict=True)]

    def _close(self, counts: Sequence[float]) -> float:
        """About how many documents are close by these counts: 0 where three deviations of noise could make them."""
        close = [n for n, edge in zip(counts, EDGES, strict=True) if edge >= CLOSE]
        return sum(close) * (sum(close) > 3 * self.noise_multiplier * len(close) ** 0.5)

    def _vectors(self, queries: Sequence[str]) -> Program:
        out = yield Ask(self.meaning, {SERVER: {"queries": list(queries)}})
        return out[SERVER]["vectors"]

    def _values(self, query: torch.Tensor, state: State | None) -> Mapping[str, float]:
        """The sites' values for this query; a site of which nothing is known has none, and is always asked."""
        samples = (state or {}).get("samples", {})
        if self.select_by == "all" or any(x.shape[1] != len(query) for x in samples.values()) or not samples:
            return {}
        if self.select_by == "centroids":
            return routing.centroids(query, samples)
        assert state is not None
        if self.select_by == "learned":
            return routing.learned(query, state["map"], list(samples))
        return routing.redde(query, samples, state["documents"])

    def _merged(self, out: Mapping[str, Payload], value: Mapping[str, float]) -> list[rt.Passage]:
        """Where a site gives no ids, its documents are called by its name and their number there. Two documents that a
        site calls alike are two (files of the same name in two folders)."""
        names = {c: [("", d, 0) if self.shared_ids and r["ids"] else (c, d, int(i)) for d, i in
                     zip(r["ids"] or [f"{c}/{int(i)}" for i in r["at"]], r["at"], strict=True)] for c, r in out.items()}
        marks = {c: r["near"] if self.merge_by == "rerank" else r["scores"] for c, r in out.items()}
        lists = {c: list(zip(names[c], marks[c], strict=True)) for c in out}
        said: dict[Any, str] = {}
        where: dict[Any, int] = {}
        for c, r in out.items():
            for i, at in zip(names[c], r["at"], strict=True):
                where.setdefault((c, i), int(at))
            for i, t in zip(names[c], r["texts"], strict=False):
                said.setdefault(i, t)
        merged = rt.merge(lists, self.merge_by, self.rrf_k, {c: (r["mean"], r["deviation"]) for c, r in out.items()},
                          value)
        return [rt.Passage(d[1], at, worth, said.get(d, ""), where[at[0], d]) for d, worth, at in merged]

    def _fetched(self, picked: Sequence[rt.Passage], wait: float | None) -> Program:
        """These passages with their text."""
        wanted = {c: [p for p in picked if p.clients[0] == c] for c in sorted({p.clients[0] for p in picked})}
        out = yield Ask(self.fetch, {c: {"at": [p.at for p in ps]} for c, ps in wanted.items()}, quorum=0,
                        deadline=wait)
        said = {p: t for c, r in out.items() for p, t in zip(wanted[c], r["texts"], strict=False)}
        return [rt.Passage(p.id, p.clients, p.worth, said.get(p, ""), p.at) for p in picked]

    def figures(self, state: State, clients, rows: Sequence[Any], depth: int) -> Program:
        """(nDCG, recall) of each row that says which documents it wants; no text is sent for it."""
        rows = [row for row in rows if rt.relevant(row)]
        got = []
        for begin in range(0, len(rows), AT_ONCE):
            some = rows[begin: begin + AT_ONCE]
            found = yield from self.search([row.get("prompt") or row["text"] for row in some], clients, state)
            for row, (passages, _, _) in zip(some, found, strict=True):
                ids, grades = list(dict.fromkeys(p.id for p in passages)), rt.relevant(row)
                got.append((rt.ndcg(ids, grades, depth), rt.recall(ids, grades, depth)))
        return got

    def _by(self, client: Client) -> str:
        return "vectors" if client.id in self.vectors_at else self.rank_by

    def _encoding(self, client: Client) -> Any:
        return client.holding(self.encoder) if self.encoder else client

    @on_client(gives="vectors: tensor")
    def meaning(self, msg: Payload, client: Client) -> Payload:
        """What queries mean, as vectors of length 1 [queries, d]; the server asks itself."""
        return {"vectors": indexing.unit(self._encoding(client).embed(msg["queries"]))}

    def charted(self, msg: Payload, reply: Payload) -> None:
        most = max(msg.get("sample", 0), msg.get("centers", 0))
        if (x := reply.get("sample")) is not None:
            need(x.dim() == 2 and 0 < len(x) <= most and x.shape[1] > 0, f"'sample' has the shape {list(x.shape)}, "
                 f"allowed are up to {most} vectors")

    @on_client(gives="documents: count, new: count, gone: count, sample?: tensor", fits=charted)
    def index(self, msg: Payload, client: Client) -> Payload:
        """Make the index, or bring it up to date. A site that shares scores or counts alone gives no sample, and of its
        documents their number."""
        texts = [rt.document(r) for r in client.data]
        counts, private = client.profile.shares == "counts", client.profile.shares in ("scores", "counts")
        charted = bool(msg.get("sample") or msg.get("centers"))
        done = self._updated(client, client.memory, texts, charted)
        reply = {"documents": done.documents, "new": done.new * (not counts), "gone": done.gone * (not counts)}
        if not charted or private or not texts:
            return reply
        x, rng = client.memory["vectors"], client.rng("sample")
        if msg.get("sample"):
            drawn = np.sort(rng.choice(len(x), min(msg["sample"], len(x)), replace=False))
            return {**reply, "sample": x[drawn]}
        return {**reply, "sample": routing.centers_of(x, msg["centers"], rng)}

    def _updated(self, client: Client, memory: MutableMapping[str, Any], texts: Sequence[str], charted: bool = False
                 ) -> indexing.Changed:
        """The memory is the index of these documents; they become vectors where anybody reads vectors."""
        embed = self._encoding(client).embed if charted or self._reads_vectors(client) else None
        return indexing.update(memory, texts, self._by(client) != "vectors", embed, self.encoder)

    def _reads_vectors(self, client: Client) -> bool:
        return client.profile.shares == "counts" or self._by(client) != "bm25" or self.merge_by == "rerank"

    @cached_property
    def _followed(self) -> indexing.Followed:
        return indexing.Followed()

    def _index(self, client: Client) -> Mapping[str, Any]:
        """The index of the client's documents as they are now; without a round before it is this process's alone."""
        rows = client.data

        def texts() -> list[str]:
            return [rt.document(r) for r in rows]

        parts = [*(("bm25", "words") if self._by(client) != "vectors" else ()),
                 *(("vectors",) if self._reads_vectors(client) else ())]
        return self._followed.of(client.id, rows, texts, client.memory, parts,
                                 lambda m: self._updated(client, m, texts()))

    def fits(self, msg: Payload, reply: Payload) -> None:
        aligned(reply, ("at", "scores"))
        need(len(reply["at"]) <= msg["k"], f"'at' names {len(reply['at'])} documents, allowed are {msg['k']}")
        need(all(i >= 0 and i == int(i) for i in reply["at"]), "'at' holds what is no document's number")
        for part in ("ids", "texts"):
            need(len(reply[part]) in (0, len(reply["at"])), f"'{part}' has another length than 'at'")
        need(len(reply["counts"]) in (0, len(EDGES)), f"'counts' has {len(reply['counts'])} numbers, allowed are none "
             f"and {len(EDGES)}")
        near = len(reply["at"]) * (self.merge_by == "rerank")
        need(len(reply["near"]) == near, f"'near' has {len(reply['near'])} numbers, allowed are {near}")

    @on_client(gives="at: numbers, scores: numbers, mean: number, deviation: number, ids: names, texts: texts, "
                     "near: numbers, counts: numbers", fits=fits)
    def lookup(self, msg: Payload, client: Client) -> Payload:
        """The best documents of this site, as far as it shares them."""
        index = self._index(client)
        client.spend(Query())
        if client.profile.shares == "counts":
            return self._counted(index, msg, client)
        rows, shares, by = client.data, client.profile.shares or "snippets", self._by(client)
        vector = self._vector(index, msg, client) if by != "bm25" or self.merge_by == "rerank" else None
        score, hit = indexing.scores(index, by, msg["query"], vector, self.least)
        best = [int(i) for i in np.argsort(-score, kind="stable") if hit[i]][: msg["k"]]
        client.session["named"] = {*client.session.get("named", ()), *best}
        near = (index["vectors"][best] @ vector).tolist() if self.merge_by == "rerank" and best else []
        return {"at": best, "counts": [], "scores": [float(score[i]) for i in best], "near": near,
                "mean": float(score.mean()) if len(score) else 0.0,
                "deviation": float(score.std()) if len(score) else 0.0,
                "ids": [rt.name(rows[i], client.id, i) for i in best] if shares != "scores" else [],
                "texts": [rt.document(rows[i])[: self.snippet] for i in best] * (shares == "snippets" and msg["text"])}

    def _counted(self, index: Mapping[str, Any], msg: Payload, client: Client) -> Payload:
        """How many documents have which cosine to the query. One that comes or goes moves one count by one, so that
        Gaussian noise of that deviation is a release of that multiplier, which the site books before it answers."""
        x = index["vectors"]
        counts, _ = np.histogram((x @ self._vector(index, msg, client)).double().numpy(), [*EDGES, 2.0])
        client.spend(Release(self.noise_multiplier, law="discrete"))
        noise = discrete_gaussian(Coins(), counts.shape, self.noise_multiplier)
        return {"at": [], "scores": [], "near": [], "mean": 0.0, "deviation": 0.0, "ids": [], "texts": [],
                "counts": (counts + noise).tolist()}

    def _vector(self, index: Mapping[str, Any], msg: Payload, client: Client) -> torch.Tensor:
        """The query's, as the server made it, or by the model that this client holds in its place."""
        if "vector" in msg and (self.encoder or client.profile.model is None):
            return msg["vector"].to(index["vectors"].dtype)
        return indexing.unit(self._encoding(client).embed([msg["query"]]))[0]

    @on_client(gives="texts: texts", fits=lambda self, msg, reply: need(
        len(reply["texts"]) in (0, len(msg["at"])), "'texts' has another length than what was asked for"))
    def fetch(self, msg: Payload, client: Client) -> Payload:
        """The beginnings of documents that this site has just named, where it shares snippets; of no others."""
        if (client.profile.shares or "snippets") != "snippets":
            return {"texts": []}
        named = client.session.get("named", ())
        return {"texts": [rt.document(client.data[int(i)])[: self.snippet] if i in named else "" for i in msg["at"]]}

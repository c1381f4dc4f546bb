"""Search among documents: BM25 as a sparse matrix, lists of several engines merged into one, and how good a list is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm.core.errors import RecipeError
from fedllm.core.payload import Tree

WORD = re.compile(r"\w+")
Hit = tuple[str, float]
"""(document's id, its score at the engine that found it)."""


@dataclass(frozen=True)
class Passage:
    """A document that was found: its id, the sites that found it, its worth in the merged list, what was sent of it."""

    id: str
    clients: tuple[str, ...]
    worth: float
    text: str


@dataclass(frozen=True)
class Found:
    """An answer with the passages that it rests on, cited by number; `answer` is None where no document matches."""

    question: str
    answer: str | None
    passages: tuple[Passage, ...] = ()

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose documents it rests on."""
        return tuple(sorted({c for p in self.passages for c in p.clients}))


def document(row: Mapping[str, Any]) -> str:
    """A row's text."""
    return str(row["text"] if "text" in row else f"{row.get('prompt', '')} {row.get('response', '')}").strip()


def name(row: Mapping[str, Any], client: str, i: int) -> str:
    """A document's id: its own, or where it lies."""
    return str(row.get("id", f"{client}/{i}"))


def relevant(row: Mapping[str, Any]) -> dict[str, float]:
    """Document -> grade."""
    wanted = row.get("relevant") or {}
    wanted = [wanted] if isinstance(wanted, str) else wanted
    return {str(d): float(g) for d, g in (wanted.items() if isinstance(wanted, Mapping) else ((d, 1) for d in wanted))}


def words(text: str) -> list[str]:
    """Lower-case words, of any language that puts something between them."""
    return WORD.findall(text.lower())


def lexical() -> None:
    """RecipeError where the package that indexes words is not installed."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        raise RecipeError("method.rank_by = 'bm25' needs the optional extra: pip install 'fedlm[rag]'; without it "
                          "allowed is 'vectors'") from None


def bm25_index(texts: Sequence[str]) -> tuple[Tree, list[str]]:
    """BM25 of these documents: a sparse matrix [documents, words] by columns, and the words.

    Equal texts give equal bits. Documents without a word are never found.
    """
    import bm25s

    tokens = [words(t) for t in texts]
    known = {w: i for i, w in enumerate(sorted({w for doc in tokens for w in doc}))}
    if not known:
        empty = torch.zeros(0, dtype=torch.int64)
        return {"data": torch.zeros(0), "rows": empty, "starts": torch.zeros(1, dtype=torch.int64)}, []
    ids = [[known[w] for w in doc] for doc in tokens]
    engine = bm25s.BM25()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a document without words: 0 / 0, in no entry that is kept
        engine.index((ids, known), show_progress=False)
    s = engine.scores
    made = {"data": s["data"], "rows": s["indices"].astype(np.int64), "starts": s["indptr"].astype(np.int64)}
    return {n: torch.from_numpy(np.array(x)) for n, x in made.items()}, list(known)


def bm25_scores(index: Mapping[str, torch.Tensor], known: Sequence[str], documents: int, query: str) -> np.ndarray:
    """Each document's score [documents]: the sum of the query's columns, 0 where no word is shared."""
    at = {w: i for i, w in enumerate(known)}
    starts, out = index["starts"].numpy(), np.zeros(documents)
    for w in words(query):
        if (i := at.get(w)) is not None and i + 1 < len(starts):
            rows = index["rows"][starts[i]: starts[i + 1]].numpy()
            np.add.at(out, rows, index["data"][starts[i]: starts[i + 1]].numpy())
    return out


def merge(lists: Mapping[str, Sequence[Hit]], by: str, rrf_k: int = 60,
          spread: Mapping[str, tuple[float, float]] | None = None) -> list[tuple[str, float, tuple[str, ...]]]:
    """One list from those of several engines, whose scores say nothing of each other: (id, worth, who found it).

    `rrf`: sum of 1 / (k + rank). `zscore`: sum of (score - mean) / deviation, by the mean and deviation (`spread`) of
    the scores that the engine gave to ALL its documents: how far a hit stands out where it was found. Equals stand in
    the order of rank, then of id.
    """
    worth: dict[str, float] = {}
    first: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for engine, hits in lists.items():
        mean, deviation = (spread or {}).get(engine, (0.0, 1.0))
        for rank, (doc, score) in enumerate(hits, 1):
            share = 1 / (rrf_k + rank) if by == "rrf" else (score - mean) / max(deviation, 1e-12)
            worth[doc] = worth.get(doc, 0.0) + share
            first[doc] = min(rank, first.get(doc, rank))
            found.setdefault(doc, []).append(engine)
    order = sorted(worth, key=lambda d: (-round(worth[d], 12), first[d], d))
    return [(d, worth[d], tuple(found[d])) for d in order]


def ndcg(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Discounted gain of the first k, sum of g / log2(1 + rank), by that of the best order; 0 if none is wanted."""
    gains = [grades.get(d, 0.0) / np.log2(1 + r) for r, d in enumerate(ranked[:k], 1)]
    best = [g / np.log2(1 + r) for r, g in enumerate(sorted(grades.values(), reverse=True)[:k], 1)]
    return float(sum(gains) / sum(best)) if sum(best) else 0.0


def recall(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Share of the wanted documents (grade above 0) among the first k."""
    wanted = {d for d, g in grades.items() if g > 0}
    return len(wanted & set(ranked[:k])) / len(wanted) if wanted else 0.0

"""Search among documents: BM25 as a sparse matrix, lists of several engines merged into one, and how good a list is."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedllm.core.errors import RecipeError
from fedllm.core.payload import Tree

WORD = re.compile(r"\w+")
UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+)")
"""Characters of Chinese and Japanese, which put nothing between words."""
Hit = tuple[Any, float]
"""(what the document is called: an id, or whose it is and its id; its score at the engine that found it)."""


@dataclass(frozen=True)
class Passage:
    """A document that was found: its id, the sites that found it, its worth in the merged list, what was sent of it."""

    id: str
    clients: tuple[str, ...]
    worth: float
    text: str
    """Empty where its site does not give text."""
    at: int = 0
    """Its number at the first of its sites."""


@dataclass(frozen=True)
class Found:
    """An answer with the passages that it rests on, cited by number; `answer` is None where no document matches."""

    question: str
    answer: str | None
    passages: tuple[Passage, ...] = ()
    cited: tuple[int, ...] = ()
    """Numbers (from 1) of the passages that support a sentence of the answer."""
    left_out: int = 0
    """Sentences of these passages that the model was not shown, since they tell a reader what to do."""
    asked: tuple[str, ...] = ()
    """The sites to which the question went."""
    near: Mapping[str, float] = field(default_factory=dict)
    """Sites that share counts alone: about how many of their documents are close to the question (cosine 0.5 or more),
    with noise; less than noise can make is nothing."""

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
    """Lower-case words, whatever code points a letter is written with (NFKC: ligatures of PDFs, letters and their marks
    apart). Of Chinese and Japanese they are the characters and each two in a row."""
    found = WORD.findall(unicodedata.normalize("NFKC", text).lower())
    if text.isascii():
        return found
    pieces = [piece for word in found for piece in UNSPACED.split(word) if piece]
    return [w for p in pieces for w in ([*p, *map("".join, itertools.pairwise(p))] if UNSPACED.match(p) else [p])]


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
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG as it is imported
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
    for w, times in Counter(words(query)).items():
        if (i := at.get(w)) is not None and i + 1 < len(starts):
            rows = index["rows"][starts[i]: starts[i + 1]].numpy()
            np.add.at(out, rows, times * index["data"][starts[i]: starts[i + 1]].numpy())
    return out


WAYS = ("rrf", "zscore", "minmax", "cori", "round_robin", "rerank")
"""How lists are merged; see `merge`."""
SCORED = ("zscore", "minmax", "cori")
"""Ways in which scores count, and not ranks alone."""


def merge(lists: Mapping[str, Sequence[Hit]], by: str, rrf_k: int = 60,
          spread: Mapping[str, tuple[float, float]] | None = None, value: Mapping[str, float] | None = None
          ) -> list[tuple[Any, float, tuple[str, ...]]]:
    """One list from those of several engines, whose scores say nothing of each other: (id, worth, who found it).

    `rrf`: sum of 1 / (k + rank). `zscore`: sum of (score - mean) / deviation, by the mean and deviation (`spread`) of
    the scores that the engine gave to ALL its documents: how far a hit stands out where it was found. `minmax`: sum of
    (score - least) / (most - least) of the list. `cori`: (D + 0.4 D C) / 1.4 of that D and the engine's `value` C,
    both from 0 to 1 (Callan, Lu, Croft 1995). `round_robin`: rank by rank, engine by engine (FeB4RAG's naive-fed).
    `rerank`: scores that one model gave to all, of which a document keeps its best. Equals of the ways that read scores
    stand in the order of how far they stand out where they were found, then of their scores as they are: each site's
    best is worth 1 by `minmax`, and where a site has one document, 0 by `zscore`. Then by rank, then by id. What an
    engine lists twice counts once, where it stands first.
    """
    worth: dict[Any, float] = {}
    first: dict[Any, tuple[float, ...]] = {}
    found: dict[Any, list[str]] = {}
    share = _valued(value or {})
    for turn, (engine, hits) in enumerate(lists.items()):
        around = (spread or {}).get(engine)
        worths = _worths(by, hits, rrf_k, around, share.get(engine, 0.0))
        apart = _worths("zscore", hits, rrf_k, around, 0.0)
        for rank, ((doc, score), one, out) in enumerate(zip(hits, worths, apart, strict=True), 1):
            if engine in found.get(doc, ())[-1:]:
                continue
            best = max(worth.get(doc, one), one)
            worth[doc] = best if by in ("rerank", "round_robin") else worth.get(doc, 0.0) + one
            scored = (-round(out, 12), -round(score, 12)) if by in SCORED else ()
            place = (*scored, rank, turn * (by == "round_robin"))
            first[doc] = min(place, first.get(doc, place))
            found.setdefault(doc, []).append(engine)
    order = sorted(worth, key=lambda d: (-round(worth[d], 12), first[d], d))
    return [(d, worth[d], tuple(found[d])) for d in order]


def _worths(by: str, hits: Sequence[Hit], rrf_k: int, spread: tuple[float, float] | None, share: float) -> list[float]:
    """What each hit of one engine's list is worth."""
    mean, deviation = spread or (0.0, 1.0)
    least, most = min((s for _, s in hits), default=0.0), max((s for _, s in hits), default=0.0)
    within = lambda s: (s - least) / (most - least) if most > least else 1.0  # noqa: E731
    ways: Mapping[str, Callable[[int, float], float]] = {
        "rrf": lambda rank, s: 1 / (rrf_k + rank), "zscore": lambda rank, s: (s - mean) / max(deviation, 1e-12),
        "minmax": lambda rank, s: within(s), "cori": lambda rank, s: within(s) * (1 + 0.4 * share) / 1.4,
        "round_robin": lambda rank, s: 1 / rank, "rerank": lambda rank, s: s}
    return [ways[by](rank, s) for rank, (_, s) in enumerate(hits, 1)]


def _valued(value: Mapping[str, float]) -> dict[str, float]:
    """The engines' values from 0 to 1."""
    least, most = min(value.values(), default=0.0), max(value.values(), default=0.0)
    return {e: (v - least) / (most - least) if most > least else 1.0 for e, v in value.items()}


def ndcg(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Discounted gain of the first k, sum of g / log2(1 + rank), by that of the best order; 0 if none is wanted."""
    gains = [grades.get(d, 0.0) / np.log2(1 + r) for r, d in enumerate(ranked[:k], 1)]
    best = [g / np.log2(1 + r) for r, g in enumerate(sorted(grades.values(), reverse=True)[:k], 1)]
    return float(sum(gains) / sum(best)) if sum(best) else 0.0


def recall(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Share of the wanted documents (grade above 0) among the first k."""
    wanted = {d for d, g in grades.items() if g > 0}
    return len(wanted & set(ranked[:k])) / len(wanted) if wanted else 0.0


def precision(ranked: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Share of the wanted among the first k; places that nothing stands at count as wrong."""
    return sum(grades.get(d, 0.0) > 0 for d in ranked[:k]) / k


def np_at(ranked: Sequence[str], values: Mapping[str, float], k: int) -> float | None:
    """nP@k of engines: the values of the first k, by those of the k best; None where no engine is worth anything."""
    best = sum(sorted(values.values(), reverse=True)[:k])
    return sum(values.get(e, 0.0) for e in ranked[:k]) / best if best > 0 else None

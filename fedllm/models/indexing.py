"""A site's own index of its documents, in its client's memory: words (BM25) and vectors, updated in place.

The memory is on the site's disk (`federation/memory.py`), and in a simulation in the checkpoint. Of a document that
was there before nothing is read again: its vector stays. BM25 weighs every word by all documents, so that its matrix is
made anew where anything changed, and left alone where nothing did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm.models.retrieval import bm25_index, bm25_scores

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors [texts, d]."""


@dataclass(frozen=True)
class Changed:
    """What an update did: documents that are new, that are gone, and that are there now."""

    new: int
    gone: int
    documents: int


def update(memory: MutableMapping[str, Any], texts: Sequence[str], by_words: bool, embed: Embed | None,
           encoder: str = "") -> Changed:
    """Make the memory the index of these documents; only texts that it does not hold are embedded.

    Keys: `marks` [documents, 2] (128 bits of each text's digest), `vectors` [documents, d] of length 1 by `encoder`,
    and `bm25`, `words`.
    """
    marks = marks_of(texts)
    had = memory.get("marks", torch.zeros(0, 2, dtype=torch.int64))
    at = {tuple(m): i for i, m in enumerate(had.tolist())}
    now = [tuple(m) for m in marks.tolist()]
    same = had.shape == marks.shape and bool((had == marks).all())
    if embed is not None and not (same and "vectors" in memory and memory.get("encoder") == encoder):
        kept = at if "vectors" in memory and memory.get("encoder") == encoder else {}
        memory["vectors"], memory["encoder"] = _vectors(texts, now, kept, memory.get("vectors"), embed), encoder
    if by_words and not (same and "bm25" in memory and "words" in memory):
        memory["bm25"], memory["words"] = bm25_index(texts)
    if not same:
        memory["marks"] = marks
    return Changed(len(set(now) - at.keys()), len(at.keys() - set(now)), len(texts))


def marks_of(texts: Sequence[str]) -> torch.Tensor:
    """128 bits of each text's digest [texts, 2]."""
    return torch.tensor([_mark(t) for t in texts], dtype=torch.int64).reshape(len(texts), 2)


class Followed:
    """Indexes of the documents that are there now, whatever their clients' memories are of.

    A memory is of the documents of its last round: a site that was started again, or a run that is asked later, may
    have read others since. Such an index is made anew once in this process, and the memory left as it is.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, int, torch.Tensor]] = {}
        self._fresh: dict[str, dict[str, Any]] = {}

    def of(self, client: str, rows: Sequence[Any], texts: Callable[[], Sequence[str]], memory: Mapping[str, Any],
           parts: Sequence[str], make: Callable[[MutableMapping[str, Any]], Any]) -> Mapping[str, Any]:
        """The client's index of its `rows`, whose texts are read where they are other rows than before; `make` brings
        a copy of the memory up to date, also where it lacks some of the `parts` (another version's)."""
        had = self._known.get(client)
        if had is None or had[0] is not rows or had[1] != len(rows):
            had = self._known[client] = rows, len(rows), marks_of(texts())
            self._fresh.pop(client, None)
        if all(part in memory for part in ("marks", *parts)) and torch.equal(memory["marks"], had[2]):
            return memory
        if client not in self._fresh:
            made = dict(memory)
            make(made)
            self._fresh[client] = made
        return self._fresh[client]


def _mark(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True), int.from_bytes(digest[8:16], "big", signed=True)


def _vectors(texts: Sequence[str], marks: Sequence[tuple[int, ...]], at: Mapping[tuple[int, ...], int],
             old: torch.Tensor | None, embed: Embed) -> torch.Tensor:
    fresh = [i for i, m in enumerate(marks) if m not in at]
    new = unit(embed([texts[i] for i in fresh])) if fresh else None
    if new is not None and not at:
        return new
    like = old if new is None else new
    assert like is not None and old is not None
    out = like.new_empty(len(texts), like.shape[1])
    for i, mark in enumerate(marks):
        if mark in at:
            out[i] = old[at[mark]]
    if new is not None:
        out[fresh] = new
    return out


def unit(vectors: Any) -> torch.Tensor:
    """Rows of length 1 (or 0), in the type that they have."""
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(vectors)), dim=-1)


def scores(memory: Mapping[str, Any], by: str, query: str, vector: torch.Tensor | None, least: float = 0.0
           ) -> tuple[np.ndarray, np.ndarray]:
    """Each document's score, and whether it was found at all [documents]: it shares a word with the query, or (by
    vectors) its cosine to it is above `least`.

    `by` both: the sum of the two, each by its own mean and deviation over all documents.
    """
    n = len(memory["marks"])
    words = vectors = None
    if by != "vectors":
        words = bm25_scores(memory["bm25"], memory["words"], n, query)
    if by != "bm25":
        assert vector is not None
        vectors = (memory["vectors"] @ vector.to(memory["vectors"].dtype)).double().numpy()
    if words is None or vectors is None:
        got = vectors if words is None else words
        assert got is not None
        return got, got > (least if words is None else 0)
    return standard(words) + standard(vectors), (words > 0) | (vectors > least)


def standard(x: np.ndarray) -> np.ndarray:
    """By its own mean and deviation; zeros where all are alike."""
    return (x - x.mean()) / max(float(x.std()), 1e-12) if len(x) else x

"""What one tokenizer says in the words of another: tokens that cover the same letters, and the nearest word of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import CompositionError

ENDS = "\0end"
"""How the token that ends an answer is written, whatever a tokenizer calls it."""


def surfaces(model: Any) -> tuple[str, ...]:
    """What each of a model's tokens writes, by id, the start of a word as a blank and bytes as letters of their number.

    Special tokens have names behind a NUL, so that they are like nothing that anybody writes; those that end an answer
    are all `ENDS`. A model without a tokenizer has numbers for words.
    """
    tok, size = model.tokenizer, len(model.words)
    if tok is None:
        return tuple(ENDS if i in model.ends else str(i) for i in range(size))
    names = tok.convert_ids_to_tokens(list(range(min(size, len(tok)))))
    special, kind = set(tok.all_special_tokens), style(names)
    said = [ENDS if i in model.ends else f"\0{n}" if n in special else written(n, kind) for i, n in enumerate(names)]
    return tuple(said + [f"\0{i}" for i in range(len(said), size)])


def style(names: Sequence[str]) -> str:
    """How a vocabulary marks that a word begins: `bytes` (Ġ), `pieces` (▁), `inside` (## where none does), `words`."""
    if any(n.startswith("Ġ") for n in names):
        return "bytes"
    if any(n.startswith("▁") for n in names):
        return "pieces"
    return "inside" if any(n.startswith("##") for n in names) else "words"


def written(name: str, kind: str) -> str:
    """The bytes that a token writes, each as the letter of its number."""
    if kind == "bytes":
        known = letters()
        if all(c in known for c in name):
            return "".join(known[c] for c in name)
        return name.encode().decode("latin-1")
    if kind == "pieces":
        name = name.replace("▁", " ")
    elif kind == "inside":
        name = name[2:] if name.startswith("##") else f" {name}"
    else:
        name = f" {name}"
    return name.encode().decode("latin-1")


@functools.cache
def letters() -> dict[str, str]:
    """The alphabet of byte-level vocabularies: the visible characters stand for themselves, other bytes for the
    characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return {chr(b): chr(b) for b in seen} | {chr(256 + i): chr(b) for i, b in enumerate(rest)}


def by_span(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """For each token of `a` the one of `b` that covers the same letters of the text, blanks left out; -1: there is
    none."""
    theirs = {span: j for j, span in enumerate(_spans(b)) if span[0] < span[1]}
    return [theirs.get(span, -1) for span in _spans(a)]


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """From which letter to which each token goes; an end token is a letter too, and other special ones are none."""
    out, at = [], 0
    for w in words:
        size = 1 if w == ENDS else 0 if w.startswith("\0") else sum(not c.isspace() for c in w)
        out.append((at, at + size))
        at += size
    return out


def by_warping(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """The same by dynamic time warping on edit distances (FedMKT): tokens that are warped to one another alone, and
    write the same."""
    n, m = len(a), len(b)
    far, step = distances(a, b), np.zeros((n + 1, m + 1), np.int8)
    cost = np.full((n + 1, m + 1), np.inf)
    cost[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            before = (cost[i - 1, j - 1], cost[i - 1, j], cost[i, j - 1])
            step[i, j] = k = int(np.argmin(before))  # of equals: both go on
            cost[i, j] = far[i - 1, j - 1] + before[k]
    i, j, met = n, m, []
    while i and j:
        met.append((i - 1, j - 1))
        k = step[i, j]
        i, j = i - (k != 2), j - (k != 1)
    left, right = (np.bincount([p[s] for p in met], minlength=size) for s, size in ((0, n), (1, m)))
    out = [-1] * n
    for i, j in met:
        if left[i] == 1 == right[j] and a[i].strip() == b[j].strip():
            out[i] = j
    return out


def distances(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Edit distances [len(a), len(b)] of what tokens write, without the blank in front."""
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError:
        raise CompositionError("tokens of two tokenizers are matched by edit distance, for which rapidfuzz is needed: "
                               "pip install 'fedlm[tokens]'; with one tokenizer everywhere nothing is needed") from None
    return cdist([w.strip() for w in a], [w.strip() for w in b], scorer=Levenshtein.distance, dtype=np.int32)


class Words:
    """From the tokens of one vocabulary to those of another: the same writing, else the least edit distance."""

    def __init__(self, source: Sequence[str], target: Sequence[str]) -> None:
        self.same = source is target or tuple(source) == tuple(target)
        self.source, self.target = source, target
        self._exact = {w: i for i, w in reversed(list(enumerate(target)))}
        self._bare = {w.strip(): i for i, w in reversed(list(enumerate(target)))}
        self._known: dict[int, int] = {}

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The target's tokens for these of the source, in the same shape."""
        if self.same:
            return ids
        flat, back = np.unique(ids, return_inverse=True)
        new = [int(i) for i in flat if int(i) not in self._known]
        strange = []
        for i in new:
            w = self.source[i]
            found = self._exact.get(w, self._bare.get(w.strip()))
            if found is None:
                strange.append(i)
            else:
                self._known[i] = found
        if strange:
            near = distances([self.source[i] for i in strange], self.target).argmin(1)
            self._known |= {i: int(j) for i, j in zip(strange, near, strict=True)}
        return np.array([self._known[int(i)] for i in flat], ids.dtype)[back].reshape(ids.shape)

"""Whether a text copies one of a client's rows: words in a row, many of the same words, or the same said otherwise."""

from __future__ import annotations

import functools
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.models.overlap import rouge_l
from fedllm.models.similar import minilm

FEWEST = 4
"""Words of the shortest text or field that can be a copy; of shorter ones codes alone are looked at."""
SHORT = 40
"""Texts of fewer words copy from 8 words in a row on, or `run` where that is less."""
CODE = re.compile(r"(?=[\w-]*\d)\w[\w-]{4,}\w")
"""A number or name with digits of six characters or more: it is nobody else's."""


def words(text: str) -> tuple[str, ...]:
    """What a text says, without marks and capitals."""
    return tuple(re.findall(r"\w+", text.lower()))


def fields(row: Any) -> list[str]:
    """The texts of a row, one a field (words of a list together), and all of them together."""
    if not isinstance(row, Mapping):
        return []
    told = [v if isinstance(v, str) else " ".join(v) for v in row.values()
            if isinstance(v, str) or (isinstance(v, list | tuple) and v and all(isinstance(x, str) for x in v))]
    return [*told, " ".join(told)] if len(told) > 1 else told


@dataclass(frozen=True)
class Limits:
    """From where on a text counts as a copy."""

    run: int = 13
    """Words in a row."""
    rouge: float = 0.7
    jaccard: float = 0.7
    """Of the sets of five characters in a row."""
    cosine: float = 0.9
    near: float = 0.6
    """MiniLM's cosine from which a text may say the same in other words: a paraphrase, and no proof of one."""
    encoder: bool = True
    """Whether MiniLM is asked too: paraphrases share few words with what they say again."""


class Private:
    """A client's rows, laid out so that many texts can be held against them."""

    def __init__(self, rows: Iterable[Any], limits: Limits = Limits()) -> None:
        self.limits = limits
        self.texts = list(dict.fromkeys(t for row in rows for t in fields(row)))
        said = [words(t) for t in self.texts]
        self.codes = {c.lower() for t in self.texts for c in CODE.findall(t)}
        self.lengths = {limits.run, min(8, limits.run)}
        self.grams = {n: {hash(g) for w in said for g in grams(w, n)} for n in self.lengths}  # a quarter of the room
        self.whole: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        self.holds: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.count = [len(w) for w in said]
        for i, w in enumerate(said):
            if FEWEST <= len(w) < min(self.lengths):
                self.whole[len(w)].add(w)
            for word, n in Counter(w).items():
                self.holds[word].append((i, n))

    def copied(self, text: str) -> str | None:
        """By which rule this text is a copy of some row; None when it is none."""
        said = words(text)
        if any(c.lower() in self.codes for c in CODE.findall(text)):
            return "copy:code"
        if len(said) < FEWEST:
            return None
        run = self.limits.run if len(said) >= SHORT else min(self.lengths)
        if any(hash(w) in self.grams[run] for w in grams(said, run)):
            return "copy:run"
        if any(w in known for n, known in self.whole.items() for w in grams(said, n)):
            return "copy:whole"
        for i in self._alike(said):
            if rouge_l(" ".join(said), " ".join(words(self.texts[i])), self.limits.rouge) >= self.limits.rouge:
                return "copy:rouge"
            if jaccard(text, self.texts[i]) >= self.limits.jaccard:
                return "copy:shingles"
        return self._said_again(text) if self.limits.encoder else None

    def _alike(self, said: Sequence[str]) -> list[int]:
        """Texts of which so many words are shared that they may be copies, the likeliest first."""
        shared: Counter[int] = Counter()
        for word, n in Counter(said).items():
            for i, m in self.holds.get(word, ()):
                shared[i] += min(n, m)
        least = min(0.5, self.limits.rouge)
        share = {i: 2 * c / (len(said) + self.count[i]) for i, c in shared.items() if self.count[i] >= FEWEST}
        return sorted((i for i, s in share.items() if s >= least), key=lambda i: (-share[i], i))

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        return vectors([t for t, n in zip(self.texts, self.count, strict=True) if n >= FEWEST])

    def _said_again(self, text: str) -> str | None:
        close = float((self._vectors @ minilm([text])[0]).max()) if len(self._vectors) else 0.0
        if close < self.limits.near:
            return None
        return "copy:embedding" if close >= self.limits.cosine else "near:embedding"


SEEN: OrderedDict[str, np.ndarray] = OrderedDict()
"""MiniLM's vectors of the last texts that were read."""
MOST = 100_000


def vectors(texts: Sequence[str]) -> np.ndarray:
    """MiniLM's vectors [texts, 384]; rows of a client are read once and not once a round."""
    if fresh := [t for t in dict.fromkeys(texts) if t not in SEEN]:
        SEEN.update(zip(fresh, minilm(fresh), strict=True))
    out = np.stack([SEEN[t] for t in texts]) if len(texts) else np.zeros((0, 384), np.float32)
    while len(SEEN) > MOST:
        SEEN.popitem(last=False)
    return out


def distinct(texts: Sequence[str], most: float = 0.7) -> list[int]:
    """Which texts are no text before them again: indices of those whose pieces are at most so alike to a kept one's."""
    kept: list[tuple[int, set[str]]] = []
    for i, text in enumerate(texts):
        mine = pieces(text)
        if all(len(mine & other) <= most * len(mine | other) for _, other in kept):
            kept.append((i, mine))
    return [i for i, _ in kept]


def grams(said: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    """Every n words in a row."""
    return (tuple(said[i : i + n]) for i in range(len(said) - n + 1))


def pieces(text: str, n: int = 5) -> set[str]:
    """Every n characters in a row, without marks and capitals."""
    plain = " ".join(words(text))
    return {plain[i : i + n] for i in range(max(1, len(plain) - n + 1))}


def jaccard(one: str, other: str, n: int = 5) -> float:
    """How many sets of n characters in a row two texts share, of all that one of them has."""
    a, b = pieces(one, n), pieces(other, n)
    return len(a & b) / len(a | b)

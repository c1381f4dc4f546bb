"""Text that clients share: words that many rows have and values of none, entries by name, and which fits a question."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fedllm.core.form import aligned, need
from fedllm.core.payload import Payload, Tree
from fedllm.models import retrieval as rt
from fedllm.models.similar import embedder

VALUES = ((re.compile(r"\S+@\S+"), "<address>"), (re.compile(r"\w+://\S+"), "<link>"),
          (re.compile(r"\"[^\"]*\"|'[^']{3,}'"), "<quote>"), (re.compile(r"\w*\d[\w.,:-]*"), "<number>"))
"""What is a value and no word, and what stands for it."""
ENTRY = 600
"""Characters of the longest entry."""


@dataclass(frozen=True)
class Entry:
    """A named text, and who wrote it: nobody's entry takes the place of another's."""

    name: str
    text: str
    client: str = ""


def masked(text: str) -> str:
    """The text with typed placeholders for its values."""
    for what, stands in VALUES:
        text = what.sub(stands, text)
    return " ".join(text.split())


def shared_words(texts: Sequence[str], least: int) -> list[str]:
    """Words without values that at least `least` of these texts have, the most frequent first."""
    have = Counter(w for t in texts for w in set(rt.words(re.sub(r"<\w+>", " ", masked(t)))))
    return sorted((w for w, n in have.items() if n >= least), key=lambda w: (-have[w], w))


def sent(entries: Sequence[Entry]) -> Payload:
    """Entries as a payload."""
    return {"names": [e.name for e in entries], "texts": [e.text for e in entries]}


def check_sent(method: object, msg: Payload, reply: Payload) -> None:
    """PayloadError unless each entry has a name and a text of bounded length."""
    aligned(reply, ("names", "texts"))
    need(all(len(t) <= ENTRY for t in reply["texts"]), f"'texts' holds an entry above {ENTRY} characters")


def received(client: str, reply: Payload) -> list[Entry]:
    """A client's entries, with its name on each."""
    return [Entry(n, t, client) for n, t in zip(reply["names"], reply["texts"], strict=True)]


def stored(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """As a state holds them."""
    return [asdict(e) for e in entries]


def united(entries: Sequence[Entry], alike: float) -> list[Entry]:
    """The entries in the order of their names and texts, whoever came first; of those of one name whose words agree by
    at least `alike` (Jaccard) the first is kept."""
    kept: list[Entry] = []
    for e in sorted(entries, key=lambda e: (e.name, e.text, e.client)):
        mine = set(rt.words(e.text))
        near = (set(rt.words(k.text)) for k in kept if k.name == e.name)
        if not any(len(mine & o) >= alike * max(1, len(mine | o)) for o in near):
            kept.append(e)
    return kept


@functools.lru_cache(maxsize=16)
def _indexed(texts: tuple[str, ...]) -> tuple[Tree, list[str]]:
    """Entries stay as they are from one question to the next."""
    return rt.bm25_index(texts)


def ranked(query: str, texts: Sequence[str], by: str) -> list[tuple[int, float]]:
    """(index, score) of the texts that share anything with the query, the best first; `by` bm25, tfidf or minilm."""
    if not texts:
        return []
    if by == "bm25":
        index, known = _indexed(tuple(texts))
        score = rt.bm25_scores(index, known, len(texts), query)
    else:
        x = embedder(by)[0]([query, *texts])
        score = np.asarray(x[1:] @ x[0], np.float64)
    order = np.argsort(-np.round(score, 9), kind="stable")
    return [(int(i), float(score[i])) for i in order if score[i] > 0]

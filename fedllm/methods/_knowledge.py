"""What a language model finds likely at each target of some rows, as it is told to another (FedMKT, FedCoLLM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError
from fedllm.core.form import need, shaped
from fedllm.core.payload import Payload, Tree
from fedllm.core.rng import numpy_stream
from fedllm.local.objectives.top_words import Told
from fedllm.models.token_map import Words, by_span, by_warping, surfaces

Top = tuple[np.ndarray, np.ndarray]
"""Of one row: words [targets, k] and their probabilities [targets, k]."""


@dataclass(frozen=True)
class Knowledge:
    """Of some rows the likeliest words at each target, and how unlikely the whole answer is (nats)."""

    top: Sequence[Top]
    ce: np.ndarray

    def wide(self, k: int) -> Knowledge:
        """The likeliest k words; where there are fewer, words of probability 0 beside them."""
        fit = lambda x: np.pad(x[:, :k], ((0, 0), (0, max(0, k - x.shape[1]))))  # noqa: E731
        return Knowledge([(fit(w), fit(p)) for w, p in self.top], self.ce)

    def packed(self, half: bool) -> Payload:
        """As it crosses: the rows' targets one after another."""
        return {"words": torch.from_numpy(np.concatenate([w for w, _ in self.top]).astype(np.int32)),
                "p": torch.from_numpy(np.concatenate([p for _, p in self.top])).to(torch.float16 if half
                                                                                  else torch.float32),
                "ce": torch.from_numpy(np.asarray(self.ce, np.float64))}

    @classmethod
    def read(cls, told: Payload, counts: Sequence[int]) -> Knowledge:
        """What `packed` made, of rows with so many targets each; probabilities sum to 1 again."""
        cut = np.cumsum(counts)[:-1]
        p = told["p"].double().numpy()
        p = p / np.maximum(p.sum(1, keepdims=True), 1e-30)
        words = np.split(told["words"].numpy().astype(np.int64), cut)
        return cls(list(zip(words, np.split(p, cut), strict=True)), told["ce"].numpy())

    def side(self) -> dict[str, list[Tensor]]:
        """As the objective `top_words` takes it."""
        return {"words": [torch.from_numpy(w) for w, _ in self.top], "p": [torch.from_numpy(p) for _, p in self.top]}


def knows(client: Any, theta: Tree, rows: Sequence[Any], k: int, temperature: float) -> Knowledge:
    """What the client's model with these trainables finds likely, on tokenized rows."""
    counts = [len(targets(r)) for r in rows]
    most = max(counts)
    got = client.measure(theta, rows, Told(k, most, temperature))
    told = got[:, 1:].reshape(len(rows), 2, most, -1)
    return Knowledge([(told[i, 0, :n].astype(np.int64), told[i, 1, :n].astype(np.float64))
                      for i, n in enumerate(counts)], got[:, 0].astype(np.float64))


def targets(row: Any) -> np.ndarray:
    """The tokens that are learned of a row of text."""
    return row.labels[row.labels >= 0]


def drawn(public: Sequence[Any], many: int, *key: Any) -> list[Any]:
    """So many of the public rows, the same for all who draw with this key."""
    at = numpy_stream(*key).choice(len(public), min(many, len(public)), replace=False)
    return [public[int(i)] for i in at]


def picked(each: Sequence[Knowledge], strategy: str) -> Knowledge:
    """Of each row whose word counts. `each[0]` is one's own: `greater` takes whoever finds the answer likeliest,
    `other` the same among the others, `weighted_mean` all by exp(-nats a target)."""
    first, out = each[0], []
    ce = np.stack([k.ce for k in each])  # [models, rows]
    for i in range(len(first.ce)):
        if strategy == "weighted_mean":
            a = ce[:, i] / max(1, len(first.top[i][0]))
            w = np.exp(a.min() - a)
            w = w / w.sum()
            out.append((np.concatenate([k.top[i][0] for k in each], 1),
                        np.concatenate([x * k.top[i][1] for x, k in zip(w, each, strict=True)], 1)))
            continue
        start = 1 if strategy == "other" and len(each) > 1 else 0
        best = each[start + int(np.argmin(ce[start:, i]))]
        out.append(best.top[i])
    return Knowledge(out, ce.min(0)).wide(max(w.shape[1] for w, _ in out))


def fits_knowledge(rows: Sequence[int], k: int, words: int, told: Mapping[str, Any]) -> None:
    """PayloadError for what is not k words of a vocabulary of `words` at each of the rows' targets."""
    many = sum(rows)
    shaped("p", told["p"], (many, k))
    shaped("words", told["words"], (many, k))
    shaped("ce", told["ce"], (len(rows),))
    need(bool((told["words"] >= 0).all() and (told["words"] < words).all()), f"'words' holds a token that is none of "
                                                                             f"{words}")
    need(bool((told["p"] >= 0).all()), "'p' holds a probability below 0")


@dataclass(frozen=True)
class Bridge:
    """Between two readings of the same rows: each side's targets, and what the other's words are here."""

    mine: Sequence[np.ndarray]
    theirs: Sequence[np.ndarray]
    pairs: Sequence[Sequence[int]]
    """For each of my targets theirs that stands for the same letters, or -1."""
    back: Sequence[Sequence[int]]
    to_mine: Words
    to_theirs: Words

    def here(self, told: Knowledge) -> Knowledge:
        """Theirs at my targets, in my words."""
        return carried(told, self.mine, self.pairs, self.to_mine)

    def there(self, told: Knowledge) -> Knowledge:
        """Mine at theirs."""
        return carried(told, self.theirs, self.back, self.to_theirs)


def carried(told: Knowledge, base: Sequence[np.ndarray], pairs: Sequence[Sequence[int]], to: Words) -> Knowledge:
    """A target that stands for the same letters takes the other's words as this vocabulary has them; any other says
    the target itself."""
    out = []
    for (words, p), label, at in zip(told.top, base, pairs, strict=True):
        k = words.shape[1]
        w, q = np.zeros((len(label), k), np.int64), np.zeros((len(label), k))
        w[:, 0], q[:, 0] = label, 1.0
        mine = np.array(at)
        met = mine >= 0
        w[met], q[met] = to.of(words[mine[met]]), p[mine[met]]
        out.append((w, q))
    return Knowledge(out, told.ce)


def bridge(client: Any, mine: Sequence[Any], theirs: Sequence[np.ndarray], words: Sequence[str], how: str) -> Bridge:
    """How this client's reading of some rows goes with another's, whose vocabulary writes `words`.

    `how`: `spans`, tokens that cover the same letters; `dtw`, as FedMKT; `skip`: there is one tokenizer.
    CompositionError where the two have no token in common, or are two with `skip`.
    """
    own = surfaces(client.model)
    here = [targets(r) for r in mine]
    to_mine, to_theirs = Words(words, own), Words(own, words)
    if to_mine.same and all(np.array_equal(a, b) for a, b in zip(here, theirs, strict=True)):
        same = [range(len(a)) for a in here]
        return Bridge(here, theirs, same, same, to_mine, to_theirs)
    if how == "skip":
        raise CompositionError(f"method.align = 'skip' is not allowed: client '{client.id}' reads the public rows by "
                               "another tokenizer than the server; use align = 'spans' or 'dtw'")
    match = by_span if how == "spans" else by_warping
    said = [([own[i] for i in a], [words[i] for i in b]) for a, b in zip(here, theirs, strict=True)]
    pairs = [match(a, b) for a, b in said]
    if not any(a[i] == b[j] or a[i].strip() == b[j].strip() for (a, b), row in zip(said, pairs, strict=True)
               for i, j in enumerate(row) if j >= 0 and not a[i].startswith("\0")):
        raise CompositionError(
            f"client '{client.id}': its tokenizer and the server's have no text in common: of {sum(map(len, here))} "
            "tokens of the public rows' answers none covers what one of the server's does; give both a tokenizer that "
            "writes the same text, or public rows that both can read")
    return Bridge(here, theirs, pairs, [match(b, a) for a, b in said], to_mine, to_theirs)

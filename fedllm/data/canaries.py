"""Canaries: random rows planted by coin flips, so that what a model keeps of single rows can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedllm.core.errors import DataError, RunError
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard

PROMPT, RESPONSE = 4, 6
"""Words of a canary."""


@dataclass(frozen=True)
class Canary:
    """One random row, whose it is, and whether the coin planted it."""

    client: str
    row: Row
    planted: bool


def canaries(clients: Sequence[str], count: int, seed: int, tokenizer: Any, labels: Sequence[str] = ()) -> list[Canary]:
    """`count` canaries of each client, the same for the same seed; half of each client's, by coins, are planted."""
    words = usual_words(tokenizer)
    out = []
    for client in clients:
        rng = numpy_stream(seed, "canaries", client)
        rows = random_rows(rng, count, words, labels)
        out += [Canary(client, row, bool(rng.integers(2))) for row in rows]
    return out


def random_rows(rng: np.random.Generator, count: int, words: Sequence[str], labels: Sequence[str] = ()) -> list[Row]:
    """Rows of words that do not repeat (a model copies what repeats, trained on it or not)."""
    out: list[Row] = []
    for _ in range(count):
        picks = [words[i] for i in rng.choice(len(words), PROMPT + RESPONSE, replace=False)]
        if labels:
            out.append({"text": " ".join(picks), "label": int(rng.integers(len(labels)))})
        else:
            out.append({"prompt": " ".join(picks[:PROMPT]) + " ", "response": " ".join(picks[PROMPT:])})
    return out


def usual_words(tokenizer: Any) -> list[str]:
    """The tokenizer's own words, so that a canary is as long in tokens as it looks."""
    special = set(tokenizer.all_special_ids)
    texts = (tokenizer.decode([i]).strip() for i in range(len(tokenizer)) if i not in special)
    words = sorted({t for t in texts if t.isascii() and t.isalnum()}, key=lambda t: (-len(t), t))
    if len(words) < 2 * (PROMPT + RESPONSE):
        raise DataError(f"canaries need {2 * (PROMPT + RESPONSE)} words and the model's tokenizer has {len(words)}")
    return words[:4096]


def planted(federation: Federation, count: int, copies: int, seed: int, tokenizer: Any) -> Federation:
    """The federation with every client's drawn canaries behind its own rows, each `copies` times."""
    mine: dict[str, list[Row]] = {}
    for c in canaries(list(federation.clients), count, seed, tokenizer, federation.labels):
        if c.planted:
            mine.setdefault(c.client, []).extend([c.row] * copies)
    shards = {c: Shard([*s.train, *mine.get(c, ())], s.test, s.info) for c, s in federation.clients.items()}
    return replace(federation, clients=shards)


def exposures(loss: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Carlini et al. 2019: log2 of how many random rows there are per row that the model likes as much [n].

    `loss` of the canaries, `others` of random rows that nobody trained on; 1.44 on average for a row that is as
    random to the model as they are, log2(len(others) + 1) at most.
    """
    rank = 1 + (others[None, :] < loss[:, None]).sum(1)
    return np.log2(len(others) + 1) - np.log2(rank)


def must_be_planted(count: int, folder: Any) -> None:
    """Raise RunError when a run planted no canaries."""
    if not count:
        raise RunError(f"{folder} planted no canaries, so none can be looked for; run the recipe with data.canaries=20 "
                       "(of each client), or audit without --canaries")

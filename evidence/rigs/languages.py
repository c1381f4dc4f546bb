"""Six languages that share some of their words, one a client, of which one has a tenth of the others' rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from evidence.rigs.edge import word_tokenizer
from evidence.rigs.topics import CLASSES, VOCAB, documents, pretrained, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

SHARED = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)
"""The share of its words that each language has in common with the first; its distance is one minus that."""
FEW = 2
"""The language with few rows."""


def translated(seed: int, language: int, rows: list[Encoded]) -> list[Row]:
    """The rows as text, with the language's own words in the place of those that it does not share."""
    rng = numpy_stream(seed, "language", language)
    own = np.arange(VOCAB)
    apart = rng.permutation(np.arange(20, VOCAB))[: round((1 - SHARED[language]) * (VOCAB - 20))]
    own[apart] = rng.permutation(apart)
    return [{"text": " ".join(f"w{i}" for i in own[row.ids]), "label": row.labels, "lang": f"language-{language}"}
            for row in rows]


def federation(seed: int, rows: int = 120) -> Federation:
    """A client a language with documents of the same eight topics, and 150 of its own to test on."""
    rng, shards = numpy_stream(seed, "documents in languages"), {}
    words = topics(rng, len(CLASSES))
    for j in range(len(SHARED)):
        n = rows // 10 if j == FEW else rows
        made = translated(seed, j, documents(rng, words, rng.integers(0, len(CLASSES), n + 150), 0.35))
        shards[f"language-{j}"] = Shard(made[:n], made[n:])
    return Federation(shards, [], "classification", CLASSES)


def languages(method: str, seed: int, *, space: Mapping[str, Any] | None = None, knobs: Mapping[str, Any] | None = None,
              rounds: int = 10, local: Mapping[str, Any] | None = None, alone: bool = False) -> Metrics:
    """Topics in six languages on an encoder that was pre-trained on other topics, a prompt and a head trained.

    `low_accuracy` on the language with few rows, `accuracy` the mean over languages. With `alone` the clients are also
    trained by themselves on the same steps: `rho` is the rank correlation, over the languages, of what federation
    gains with the distance from the first, and `gain` the mean.
    """
    torch.set_num_threads(1)

    def trial(name: str) -> Trial:
        own = dict(space or {"name": "streams", "of": {"prompt": {"name": "p_tuning", "length": 8}, "head": "head"}})
        made = make_space(own.pop("name"), **own)
        model = Model(pretrained(seed), word_tokenizer(), "classification", made, labels=CLASSES, seed=seed)
        spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 10, "batch_size": 16, **(local or {})})
        world = World(model, federation(seed), spec, seed)
        return Trial(name, world, dict(knobs or {}) if name == method else {}).rounds(rounds)

    run = trial(method)
    mine = [s["accuracy"] for s in run.scores("local").values()]
    out = {"low_accuracy": mine[FEW], "accuracy": float(np.mean(mine)), **run.work()}
    if alone:
        theirs = [s["accuracy"] for s in trial("local_only").scores("local").values()]
        gain, far = np.subtract(mine, theirs), 1 - np.array(SHARED)
        out |= {"rho": float(spearmanr(gain, far).statistic), "gain": float(gain.mean())}
    return out


RIGS = {"languages": languages}

"""Masked words from random weights, for a model that is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from evidence.rigs.domains import texts
from evidence.rigs.split import EVERY
from evidence.rigs.topology import gap
from evidence.rigs.trials import Metrics, Trial
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import method_class
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.tasks.masked_words import hidden

MASK = 64


def bert(seed: int) -> BertForMaskedLM:
    """Two blocks of width 32, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForMaskedLM(BertConfig(
            vocab_size=MASK + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def masked_texts(seed: int, count: int, what: str) -> list[Encoded]:
    """Rows of one domain with some words hidden."""
    return [hidden(row.ids.astype(np.int64), np.arange(len(row.ids)), MASK, MASK)
            for row in texts(seed, 0, count, what)]


def split_masked(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 10,
                 steps: int = 10, local: Mapping[str, Any] | None = None) -> Metrics:
    """A 2-layer BERT from scratch on masked words, four clients, whole models, plain SGD.

    `loss` is that on the global test. Of a model that is cut also `off_unsplit`, by how much 3 rounds of one step on
    all rows differ from FedAvg's.
    """
    torch.set_num_threads(1)
    cut = "cut" in method_class(method).knobs()
    fed = Federation({f"client-{k}": Shard(masked_texts(seed, EVERY, f"train {k}"), []) for k in range(4)},
                     masked_texts(seed, EVERY, "test"), "masked_words")  # type: ignore[arg-type]

    def trial(name: str, steps: int, batch: int) -> Trial:
        model = Model(bert(seed), None, "masked_words", make_space("full"), seed=seed)
        spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.3, "steps": steps, "batch_size": batch, **(local or {})})
        own = {"steps": steps, **(knobs or {})} if name == method and cut else {}
        return Trial(name, World(model, fed, spec, seed), own)

    run = trial(method, steps, 8).rounds(rounds)
    found = {"loss": float(np.mean([s["loss"] for s in run.scores("global").values()])), **run.work()}
    if cut:
        mine, theirs = trial(method, 1, EVERY).rounds(3), trial("fedavg", 1, EVERY).rounds(3)
        found["off_unsplit"] = gap(mine.method.served(mine.state)[0], theirs.state["theta"])
    return found


RIGS: dict[str, Callable[..., Metrics]] = {"split_masked": split_masked}

"""Everybody sees the same documents, and each client has its own names for half of the topics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.spaces import Metrics
from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces.registry import make_space

OWN = 4
"""Topics whose names are each client's own."""
SHARED = {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"}


def own_names(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 20,
              local: Mapping[str, Any] | None = None) -> Metrics:
    """Topic classification, six clients with about 130 documents of all topics, the names of four permuted by each.

    `local_*` on documents named as the client names them. `confidential_pfl` has a personal LoRA of rank 4 beside the
    shared one of rank 8 that other methods have alone.
    """
    torch.set_num_threads(1)
    drawn = topic_federation(seed, clients=6, alpha=100.0, share=0.5)
    rng = numpy_stream(seed, "own names")

    def named(shard: Shard) -> Shard:
        order = np.concatenate([rng.permutation(OWN), np.arange(OWN, len(CLASSES))])
        own = lambda rows: [Encoded(r.ids, int(order[r.labels]), 1) for r in rows]  # noqa: E731
        return Shard(own(shard.train), own(shard.test))  # type: ignore[arg-type]

    fed = replace(drawn, clients={c: named(s) for c, s in drawn.clients.items()})
    space = (make_space("streams", of={"shared": SHARED, "own": {**SHARED, "rank": 4, "alpha": 8.0}},
                        personal=("own",)) if method == "confidential_pfl"
             else make_space("lora", **{k: v for k, v in SHARED.items() if k != "name"}))
    model = Model(pretrained(seed), None, "classification", space, labels=CLASSES, seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 10, "batch_size": 16, **(local or {})})
    mine = {"open_updates": True} if method == "confidential_pfl" else {}
    run = Trial(method, World(model, fed, spec, seed), {**mine, **(knobs or {})}).rounds(rounds)
    scores = run.scores("local").values()
    return {**{f"local_{m}": float(np.mean([s[m] for s in scores])) for m in ("loss", "accuracy")}, **run.work()}


RIGS = {"own_names": own_names}

"""Clients with a handful of rows, and a small model that goes on with demonstrations: what its own rows are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.boundary import chain
from evidence.rigs.canaries import TEMPLATE, packs, teller
from evidence.rigs.canaries import words_tokenizer as words
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS
from fedllm.models.model import Model
from fedllm.models.overlap import rouge_l
from fedllm.spaces import make_space

KNOBS = {"template": TEMPLATE, "max_new_tokens": 14, "num_prompt_instructions": 3, "machine_share": 1, "target": 2.0}


def few_rows(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 3, clients: int = 3,
             rows: int = 6, moved: float = 0.2, local: Mapping[str, Any] | None = None) -> Metrics:
    """Three clients with six rows each, walks of a chain of which a fifth moved since the model was pre-trained.

    `loss` of the shared model on fresh rows of theirs; `synthetic` rows a client, and the ROUGE-L of the two prompts of
    a pool that are `nearest`.
    """
    torch.set_num_threads(1)
    model = Model(teller(seed, 280), words(), "generation", make_space("lora", rank=4), seed=seed)
    rng, after = numpy_stream(seed, "few rows"), chain(seed, moved)
    shards = {f"client-{k}": Shard(packs(rng, after, rows)) for k in range(clients)}
    fed = Federation(shards, packs(rng, after, 100), "generation")
    spec = LocalSpec(**{"lr": 3e-3, "steps": 10, "batch_size": 6, "max_length": 64, **(local or {})})
    told = {k: v for k, v in {**KNOBS, **(knobs or {})}.items() if k in METHODS[method].knobs()}
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), told).rounds(rounds)
    pools = [[r["prompt"] for r in m.get("pool", [])] for c, m in run.engine.memory.items() if c in shards]
    near = [rouge_l(a, b) for said in pools for i, a in enumerate(said) for b in said[:i]]
    loss = float(np.mean([s["loss"] for s in run.scores("global").values()]))
    return {"loss": loss, "nearest": max(near, default=0.0),
            "synthetic": float(np.mean([len(p) for p in pools])) if pools else 0.0, **run.work()}


RIGS = {"few_rows": few_rows}

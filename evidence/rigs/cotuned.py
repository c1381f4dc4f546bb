"""A large model at the server that knows some words of each kind, and clients who have documents with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.prompted import KINDS, documents, kinds_of_words, net, started, tokenizer
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

PUBLIC, EACH = 64, 60


def cotuned(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
            local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 60 documents each and a model of one block; 64 public documents with their kinds, which clients
    of a method without a teacher have among them.

    `loss` of the shared model on 200 documents, `teacher_loss` of the large one, which is also told as `teacher_ratio`
    to what it was.
    """
    torch.set_num_threads(1)
    rng, words, ours = numpy_stream(seed, "cotuned"), kinds_of_words(seed), method == "fedcollm"
    public = documents(rng, words, np.arange(PUBLIC) % len(KINDS))
    shards = {f"client-{k}": Shard([*documents(rng, words, rng.integers(0, len(KINDS), EACH)),
                                    *([] if ours else public[k::4])]) for k in range(4)}
    test = documents(rng, words, np.arange(200) % len(KINDS))
    small = Model(net(seed, 1, 32), tokenizer(), "generation", make_space("full"), seed=seed)
    large = started(seed, 4, make_space("lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj")))
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    world = World(small, Federation(shards, test, "generation", public=public), spec, seed, exact_match=False,
                  models=Shelf({"teacher": lambda: large}))
    told = {"top_k": 16, **(knobs or {})} if ours else dict(knobs or {})
    run = Trial(method, world, told).rounds(rounds)
    out = {"loss": float(next(iter(run.scores("global").values()))["loss"]), **run.work()}
    if ours:
        coded = encode_rows(test, large.tokenizer, "generation", 64)
        after, before = (run_losses([Losses("x", large, t, None, coded)], Limits())[0].mean
                         for t in (run.state["teacher"], large.initial()))
        out |= {"teacher_loss": after, "teacher_ratio": after / before}
    return out


RIGS = {"cotuned": cotuned}

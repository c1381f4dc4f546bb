"""Clients with few documents, a generator each, and a server's model that goes on from examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from evidence.rigs.written import LENGTH, classifier, federation, writer
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.shelf import Shelf


def transferred(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
                local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 32 documents of four kinds; generator and writer are one model that knows what documents are,
    and shows the kind that it is asked for half of the time. `accuracy`: the clients' mean on 300 documents; `over`: by
    how much the epsilon that was booked is above the target.
    """
    torch.set_num_threads(1)
    held, ours = writer(seed), method == "fdkt"
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 12, "batch_size": 16, "max_length": 32,
                        **(local or {})})
    world = World(classifier(seed), federation(seed), spec, seed,
                  models=Shelf({"generator": lambda: held, "writer": lambda: held}))
    told = {"target_epsilon": 8.0, "texts": 12, "more": 1, "shown": 2, "max_new_tokens": LENGTH, "generator_steps": 60,
            "embed": "tfidf", "seed": seed, "temperature": 0.8, **(knobs or {})}
    run = Trial(method, world, told if ours else dict(knobs or {})).rounds(rounds)
    work = run.work()
    if ours:
        run.rounds(1)  # the first was the generators' alone
    out = {"accuracy": float(np.mean([s["accuracy"] for s in run.scores("global").values()])), **work}
    if ours and (said := run.method.statement(run.state)):
        out["over"] = max(said["clients"].values()) - told["target_epsilon"]
    return out


RIGS = {"transferred": transferred}

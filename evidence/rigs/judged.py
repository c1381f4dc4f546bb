"""A policy that learns from what judges say, where clients' own preferences are noisy: against those as given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.camps import turned
from evidence.rigs.learning import pairs
from evidence.rigs.text import untrained
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

CHOICES = ("1", "2")


def model(seed: int) -> Model:
    """The model that judges and policy begin with."""
    return untrained(seed, space=make_space("lora", rank=8, targets="all-linear"), task="preference")


def judged(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, judges: int = 0, noise: float = 0.3,
           rounds: int = 6, local: Mapping[str, Any] | None = None) -> Metrics:
    """Six clients with 24 pairs each, of which a share `noise` was given the wrong way round; all are scored on
    held-out pairs that are right. `judges` > 0: FedBiscuit's so many are trained on them before, 12 rounds, and the
    policy learns from their vote; `right` is the share of training pairs that it is told the right way round.
    """
    torch.set_num_threads(1)
    rng, shards, wrong = numpy_stream(seed, "judged"), {}, {}
    for k in range(6):
        rows, test = pairs(rng, 24), pairs(rng, 16)
        wrong[f"client-{k}"] = off = rng.random(24) < noise
        shards[f"client-{k}"] = Shard([turned([r])[0] if w else r for r, w in zip(rows, off, strict=True)], test)
    fed, told = Federation(shards, pairs(rng, 8), "preference"), dict(knobs or {})
    spec = LocalSpec(**{"lr": 1e-2, "steps": 6, "batch_size": 8, "max_length": 96, **(local or {})})
    world = World(model(seed), fed, spec, seed, exact_match=False)
    if judges:
        first = World(model(seed), fed, LocalSpec(lr=1e-2, steps=12, batch_size=16, max_length=96), seed,
                      exact_match=False)
        state = Trial("fedbiscuit", first, {"groups": judges, "choices": CHOICES,
                                            "warmup": 12 if judges > 1 else 0}).rounds(12).state
        made = {f"judge-{g}": model(seed) for g in range(judges)}
        for g, name in enumerate(made):
            made[name].start = state["judges"][str(g)]
        world.models = Shelf({name: lambda m=m: m for name, m in made.items()})
        told |= {"judges": tuple(made), "choices": CHOICES}
    run = Trial(method, world, told).rounds(rounds)
    scores = run.scores("local").values()
    turns = {c: np.asarray(m["turn"]) if "turn" in m else np.zeros(24, bool) for c, m in run.engine.memory.items()}
    right = float(np.mean([(turns.get(c, np.zeros(24, bool)) == off).mean() for c, off in wrong.items()]))
    return {**{m: float(np.mean([s[m] for s in scores])) for m in ("preference", "dpo_loss")}, "right": right,
            **run.work()}


RIGS = {"judged": judged}

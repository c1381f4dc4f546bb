"""Rigs for what clients descend: preferences between two answers, on a small model that knows nothing yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.text import untrained
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.spaces import make_space

KIND, UNKIND = ("bought", "picked", "added"), ("ate", "eaten", "eats")


def pairs(rng: np.random.Generator, count: int) -> list[Row]:
    """A prompt and two answers of the same numbers; in one of the places the chosen one has a kind word and the
    rejected one an unkind."""
    out: list[Row] = []
    for _ in range(count):
        said = [str(n) for n in rng.integers(1, 25, 5)]
        at = int(rng.integers(5))
        good, bad = (" ".join([*said[:at], str(rng.choice(words)), *said[at:]]) for words in (KIND, UNKIND))
        out.append({"prompt": "How many apples " + str(rng.choice(["are left", "has Tom", "were there"])),
                    "chosen": good, "rejected": bad})
    return out


def preferences(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
                local: Mapping[str, Any] | None = None) -> Metrics:
    """Six clients with 24 pairs each, LoRA on a model with random weights; all are scored on held-out pairs.

    `preference` is the share in which the chosen answer gained more than the rejected since the start, `dpo_loss` the
    loss at beta 0.1, `start_error` how far each client's is from ln 2 at the start.
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "preferences")
    fed = Federation({f"client-{k}": Shard(pairs(rng, 24), pairs(rng, 16)) for k in range(6)}, pairs(rng, 8),
                     "preference")
    model = untrained(seed, space=make_space("lora", rank=8, targets="all-linear"), task="preference")
    spec = LocalSpec(**{"lr": 3e-3, "steps": 6, "batch_size": 8, "max_length": 64, **(local or {})})
    world = World(model, fed, spec, seed, exact_match=False)
    before = _scores(world, model.initial())
    run = Trial(method, world, dict(knobs or {})).rounds(rounds)
    after = _scores(world, run.method.served(run.state)[0])
    mean = {m: float(np.mean([s[m] for s in after])) for m in ("preference", "dpo_loss")}
    return {**mean, **run.work(), "start_error": max(abs(s["dpo_loss"] - math.log(2)) for s in before)}


def _scores(world: World, theta: Any) -> list[Mapping[str, Any]]:
    examiner = make_method("fed_dpo")
    engine = Vectorized((examiner,), world)
    return list(drive(examiner.evaluate({"theta": theta}, world.infos(), "local"), engine).values())


RIGS = {"preferences": preferences}

"""Answers that a program checks: a small model with wrong beliefs, and clients that ask of different things."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.text import untrained
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model

WORDS = ("bought", "picked", "added", "ate")
"""What may be answered; to each of the numbers 1 to 24 one of them is right, and another is what the model believes."""
BELIEVED = (0.55, 0.3)
"""How often practice says the wrong word, and how often the right one; the others share the rest."""
PRACTICE = 200


def answers(seed: int) -> list[tuple[str, str]]:
    """The right word for each number, and the one that is believed."""
    rng = numpy_stream(seed, "answers")
    drawn = [rng.choice(WORDS, 2, replace=False) for _ in range(24)]
    return [(str(right), str(wrong)) for right, wrong in drawn]


def questions(rng: np.random.Generator, seed: int, kind: int, count: int, practice: bool = False) -> list[Row]:
    """A number among words that say nothing, out of the six of this kind, and the right word, or what practice says."""
    out: list[Row] = []
    for _ in range(count):
        n, fill = int(rng.integers(6)) + 6 * kind, rng.choice(["Tom", "has", "apples", "many", "number", "were"], 3)
        said, wrong = answers(seed)[n]
        if practice and rng.random() >= BELIEVED[1]:
            sure = rng.random() < BELIEVED[0] / (1 - BELIEVED[1])
            said = wrong if sure else str(rng.choice(WORDS))
        out.append({"prompt": f"{fill[0]} {n + 1} {fill[1]} {fill[2]} :", "response": said})
    return out


@functools.lru_cache(maxsize=4)
def base(seed: int) -> tuple[Model, Tree]:
    """A two-layer Llama that answers as it practiced: with the wrong word more often than with the right one."""
    model, rng = untrained(seed, width=32), numpy_stream(seed, "practice")
    rows = [r for kind in range(4) for r in questions(rng, seed, kind, 256, practice=True)]
    coded = encode_rows(rows, model.tokenizer, "generation", 32)
    theta, how = model.initial(), LocalSpec(lr=3e-3, steps=PRACTICE, batch_size=64, clip_norm=1.0, beta2=0.98)
    plan = [rng.choice(len(coded), how.batch_size, replace=False) for _ in range(PRACTICE)]
    return model, run_fits([Fit("practice", model, theta, None, coded, plan, how)], Limits())[0].theta


def federation(seed: int, pooled: bool = False, each: int = 64, test: int = 24) -> Federation:
    """Four clients that ask about six numbers each; the global test asks about all."""
    rng, shards = numpy_stream(seed, "questions"), {}
    for kind in range(4):
        shards[f"client-{kind}"] = Shard(questions(rng, seed, kind, each), questions(rng, seed, kind, test))
    every = [r for s in shards.values() for r in s.test]
    one = Shard([r for s in shards.values() for r in s.train], every)
    return Federation({"all": one} if pooled else shards, every, "generation")


def verifiable(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 24, alone: bool = False,
               pooled: bool = False, local: Mapping[str, Any] | None = None) -> Metrics:
    """`right`: the share of answers to questions of all kinds that are right, of the served policy or the mean of the
    clients' own (`alone`). `pooled`: one learner has everybody's questions, and as many samples and steps as four."""
    torch.set_num_threads(1)
    model, start = base(seed)
    model.start = start
    told = {"max_new_tokens": 2, "prompts": 8, "answers": 8, **(knobs or {}), **({"share": "nothing"} if alone else {})}
    spec = LocalSpec(**{"lr": 3e-3, "batch_size": 32, "max_length": 32, **(local or {})})
    if pooled:
        told["prompts"], spec = 4 * told["prompts"], replace(spec, batch_size=4 * spec.batch_size)
    run = Trial(method, World(model, federation(seed, pooled), spec, seed, max_new_tokens=2), told).rounds(rounds)
    return {"right": float(np.mean([s["exact_match"] for s in run.scores("global").values()])),
            "at_home": float(np.mean([s["exact_match"] for s in run.scores("local").values()])),
            "work_samples": float(rounds * len(run.world.infos()) * told["prompts"] * told["answers"])}


def verifiable_even(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """`moved`: how far any weight moves in a round in which every answer is as good as every other: no answer is long
    enough to be right."""
    torch.set_num_threads(1)
    model, start = base(seed)
    model.start = start
    fed = federation(seed)
    never = {c: Shard([{**r, "response": "had had had"} for r in s.train], s.test) for c, s in fed.clients.items()}
    world = World(model, replace(fed, clients=never), LocalSpec(optimizer="sgd", lr=1.0, batch_size=32, max_length=32),
                  seed, max_new_tokens=2)
    run = Trial(method, world, {"max_new_tokens": 2, "prompts": 4, **(knobs or {})}).rounds(1)
    return {"moved": max(float((run.state["theta"][n] - t).abs().max()) for n, t in start.items())}


RIGS = {"verifiable": verifiable, "verifiable_even": verifiable_even}

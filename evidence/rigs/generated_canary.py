"""A row that one client has, and nobody else: whether its generator, overfitted, writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from evidence.rigs.trials import Metrics, Trial
from evidence.rigs.written import KINDS, LENGTH, WORDS, classifier, federation, writer
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.shelf import Shelf

SAMPLES = 1000


def generated_canary(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """One client with 32 documents, of which one is eight random words, planted once. `leaked`: the share of 1000 texts
    of its generator that are that row."""
    torch.set_num_threads(1)
    fed, rng = federation(seed), numpy_stream(seed, "generated canary")
    secret = " ".join(f"w{i}" for i in rng.integers(0, WORDS, LENGTH))
    mine = fed.clients["client-0"]
    fed = replace(fed, clients={"client-0": Shard([{"text": secret, "label": 0}, *mine.train[1:]])})
    held = writer(seed)
    spec = LocalSpec(optimizer="adamw", lr=1e-2, steps=1, batch_size=16, max_length=32)
    world = World(classifier(seed), fed, spec, seed, models=Shelf({"generator": lambda: held, "writer": lambda: held}))
    told = {"target_epsilon": 3.0, "texts": SAMPLES // len(KINDS), "more": 1, "max_new_tokens": LENGTH, "shown": 1,
            "generator_steps": 300, "embed": "tfidf", "seed": seed, "least_new": 0.0, **(knobs or {})}
    run, seen = Trial(method, world, told), []
    made = type(run.engine)._run

    def heard(self: Any, requests: Any) -> Any:
        answers = made(self, requests)
        for i, request in requests.items():
            if type(request).__name__ == "Generate":
                seen.extend(held.tokenizer.decode(s, skip_special_tokens=True) for s in answers[i])  # type: ignore[union-attr]
        return answers

    run.engine._run = heard.__get__(run.engine)
    run.engine.begin(0)
    program = run.method.round(run.state, run.world.infos())
    run.engine.send([next(program)])  # the generator's part; the server's is not wanted
    program.close()
    return {"leaked": sum(t.strip() == secret for t in seen) / max(1, len(seen)), "samples": float(len(seen))}


RIGS = {"generated_canary": generated_canary}

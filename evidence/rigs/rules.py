"""Domains under rules that a model knows by a word, and clients that look for their word with few examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.prompted import KINDS
from evidence.rigs.ruled import RULE_WORDS, RULES, documents, started
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space


def rules(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, examples: int = 2, each: bool = False,
          rounds: int = 5) -> Metrics:
    """Eight clients with so few documents; the eight candidates are words, six of which the model knows as rules.

    Five clients have one rule and three another; with `each` four, two, one and one client have one each. `picked` is
    the share of clients whose likeliest rule is theirs, `exact_match` of answers to 30 documents of each.
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "rules of clients")
    some, sizes = rng.permutation(RULES), (4, 2, 1, 1) if each else (5, 3)
    planted = np.repeat(some[: len(sizes)], sizes)
    shards = {}
    for k, rule in enumerate(planted):
        rows = documents(seed, rng, rng.integers(0, len(KINDS), examples + 30), np.full(examples + 30, rule), share=0.8)
        shards[f"client-{k}"] = Shard(rows[:examples], rows[examples:])
    world = World(started(seed, make_space("soft_prompt", length=2)), Federation(shards, [], "generation"),
                  LocalSpec(max_length=64), seed, exact_match=False)
    run = Trial(method, world, {"rules": RULE_WORDS, **(knobs or {})}).rounds(rounds)
    found = [int(run.engine.memory[c]["q"].argmax()) for c in shards]
    scores = run.scores("local").values()
    return {"picked": float(np.mean(np.array(found) == planted)),
            "exact_match": float(np.mean([s["exact_match"] for s in scores])),
            "calls": float(run.method.report(run.state)["queries"]["calls"]), **run.work()}


RIGS = {"rules": rules}

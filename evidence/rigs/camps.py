"""Two camps of clients with opposite preferences, and judges that are to agree with each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.learning import pairs
from evidence.rigs.text import untrained
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space


def turned(rows: list[Row]) -> list[Row]:
    """The same pairs, preferred the other way round."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def camps(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """Six clients with 32 pairs each, three of which prefer what the others reject. `agreed` is the clients' mean share
    of own held-out pairs in which their judge says what they chose; one more number, for `fed_dpo*`: `preference`."""
    torch.set_num_threads(1)
    rng, shards = numpy_stream(seed, "camps"), {}
    for k in range(6):
        rows, test = pairs(rng, 32), pairs(rng, 24)
        shards[f"client-{k}"] = Shard(turned(rows), turned(test)) if k % 2 else Shard(rows, test)
    space = make_space("lora", rank=8, targets="all-linear") if method != "fed_dpo_personal" else make_space(
        "streams", of={"shared": {"name": "lora", "rank": 8}, "own": {"name": "lora", "rank": 8}}, personal=("own",))
    model = untrained(seed, space=space, task="preference")
    spec = LocalSpec(**{"lr": 1e-2, "steps": 12, "batch_size": 16, "max_length": 96, **(local or {})})
    world = World(model, Federation(shards, pairs(rng, 8), "preference"), spec, seed, exact_match=False)
    run = Trial(method, world, dict(knobs or {})).rounds(rounds)
    scores = run.scores("local").values()
    return {m: float(np.mean([s[m] for s in scores])) for m in ("agreed", "preference", "dpo_loss")
            if all(m in s for s in scores)} | run.work()


RIGS = {"camps": camps}

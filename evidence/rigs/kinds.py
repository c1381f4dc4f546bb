"""Clients whose documents are of one of four kinds, from random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.domains import texts
from evidence.rigs.trials import Metrics, Trial, _tiny_llama
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

KINDS = 4


def kinds(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """A 2-layer Llama from scratch, eight clients, two for each kind of document, 256 rows each.

    `loss` on 32 rows of each kind, the mean over what clients would say of them; `round_bytes`, the most that a client
    gets and sends in the last round; of paths also `misrouted`, by how much the loss is higher where every row takes
    the next path.
    """
    torch.set_num_threads(1)
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    shards = {f"client-{c}": Shard(texts(seed, c % KINDS, 256, f"train {c}"), []) for c in range(2 * KINDS)}
    test = [row for k in range(KINDS) for row in texts(seed, k, 32, "test")]
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": 10, "batch_size": 8, **(local or {})})
    world = World(model, Federation(shards, test, "generation"), spec, seed, exact_match=False)  # type: ignore[arg-type]
    run = Trial(method, world, dict(knobs or {})).rounds(rounds)
    sent = [e for e in run.engine.record.events if e["kind"] == "wire" and e["round"] == rounds - 1]
    each = [sum(e["bytes"] for e in sent if e["client"] == c) for c in shards]
    loss = float(np.mean([s["loss"] for s in run.scores("global").values()]))
    found = {"loss": loss, "round_bytes": float(max(each)), **run.work()}
    if run.state.get("centers") is not None:
        run.state = {**run.state, "centers": run.state["centers"].roll(1, 0)}
        found["misrouted"] = float(np.mean([s["loss"] for s in run.scores("global").values()])) - loss
    return found


RIGS: dict[str, Callable[..., Metrics]] = {"kinds": kinds}

"""Tools in two dialects, a few kinds of task known to each client: what libraries of skills are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.toolbook import nobody
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World

KINDS = ("invoice", "order", "parcel", "contract", "ticket", "refund", "permit", "claim", "quote", "lease", "visa",
         "grant")
DIALECTS = ("get_{k} {n}", "fetch {k} --id {n}")
FRAMES = ("show me the {k} {n}", "I need {k} number {n}", "look up {n}, a {k}", "which {k} is {n}")


def tasks(rng: np.random.Generator, kind: str, dialect: int, count: int) -> list[Row]:
    """Tasks of a kind and the calls that solve them in this dialect."""
    out: list[Row] = []
    for _ in range(count):
        n = int(rng.integers(10, 9999))
        out.append({"prompt": str(rng.choice(FRAMES)).format(k=kind, n=n),
                    "response": DIALECTS[dialect].format(k=kind, n=n)})
    return out


def offices(seed: int, pooled: bool = False) -> Federation:
    """Six clients, three in each dialect, which know two kinds that all know and three of their own; each is tested on
    all kinds in its own dialect."""
    rng = numpy_stream(seed, "skills")
    order = [KINDS[int(i)] for i in rng.permutation(len(KINDS))]
    shards = {}
    for k in range(6):
        own = [*order[:2], *(order[2 + (3 * (k // 2) + i) % 10] for i in range(4))]
        shards[f"office-{k}"] = Shard([r for kind in own for r in tasks(rng, kind, k % 2, 4)],
                                      [r for kind in KINDS for r in tasks(rng, kind, k % 2, 2)])
    test = [r for s in shards.values() for r in s.test]
    if pooled:
        shards = {"all": Shard([r for s in shards.values() for r in s.train], test)}
    return Federation(shards, test, "generation")


def skills(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, alone: bool = False,
           pooled: bool = False) -> Metrics:
    """`right`: the share of tasks of all kinds that clients solve in their own dialect after two rounds. `order`:
    skills that differ where clients answer in another order."""
    torch.set_num_threads(1)
    told = {**(knobs or {}), **({"share": "nothing"} if alone else {})}
    world = World(nobody(), offices(seed, pooled), seed=seed)
    run, back = Trial(method, world, told).rounds(2), Trial(method, world, told).rounds(2, world.infos()[::-1])
    mine, other = run.state["libraries"], back.state["libraries"]
    apart = sum(mine[c].get(p) != other[c].get(p) for c in mine for p in {*mine[c], *other[c]})
    return {"right": float(np.mean([s["right"] for s in run.scores("local").values()])), "order": float(apart)}


RIGS = {"skills": skills}

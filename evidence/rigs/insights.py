"""Words that mean arithmetic, a few known to each client: what a library of insights is worth."""

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
from fedllm.methods.agents.fot import RULES, solve

SOUNDS = ("florp", "quib", "zant", "mork", "plim", "dask", "vorn", "jeep", "sild", "wump", "trel", "grix")
FRAMES = ("what is {w} of {a} and {b}", "{a} {w} {b}", "take {a} and {b}, then {w}", "the {w} for {a} with {b}")


def asked(rng: np.random.Generator, word: str, rule: str, count: int) -> list[Row]:
    """Questions that hold a word, and its rule's answers."""
    out: list[Row] = []
    for _ in range(count):
        a, b = rng.choice(np.arange(3, 40), 2, replace=False)
        prompt = str(rng.choice(FRAMES)).format(w=word, a=a, b=b)
        out.append({"prompt": prompt, "response": solve(prompt, rule)})
    return out


def words(seed: int, pooled: bool = False, each: int = 12) -> Federation:
    """Four clients, three words each; everybody is asked about all twelve."""
    rng = numpy_stream(seed, "insights")
    meant = {w: str(rng.choice(list(RULES)[:7])) for w in SOUNDS}
    test = [r for w in SOUNDS for r in asked(rng, w, meant[w], 4)]
    mine = [[r for w in SOUNDS[3 * k : 3 * k + 3] for r in asked(rng, w, meant[w], each)] for k in range(4)]
    if pooled:
        return Federation({"all": Shard([r for some in mine for r in some], test)}, test, "generation")
    return Federation({f"agent-{k}": Shard(rows, test) for k, rows in enumerate(mine)}, test, "generation")


def insights(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, alone: bool = False,
             pooled: bool = False, permute: bool = False) -> Metrics:
    """`right`: the share of questions that are solved; with `permute` the library's names go round by one. `order`: how
    many insights of the library differ where clients answer in another order; `bytes` of the library."""
    torch.set_num_threads(1)
    world = World(nobody(), words(seed, pooled), seed=seed)
    told = {**(knobs or {}), **({"share": "nothing"} if alone else {})}
    run = Trial(method, world, told).rounds(1)
    back = Trial(method, world, told).rounds(1, world.infos()[::-1])
    library = run.state["library"]
    apart = sum(a != b for a, b in zip(library, back.state["library"], strict=True))
    if permute:
        names = [e["name"] for e in library]
        run.state = {**run.state, "library": [{**e, "name": n} for e, n in zip(library, names[1:] + names[:1],
                                                                              strict=True)]}
    return {"right": float(np.mean([s["right"] for s in run.scores("local").values()])), "order": float(apart),
            "bytes": float(sum(len(e["name"] + e["text"]) for e in library))}


RIGS = {"insights": insights}

"""Views of clients' own tests: with what all share alone, with a client's own part, with the nearest client's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm.core.client import SERVER
from fedllm.core.errors import FedLLMError
from fedllm.core.method import State
from fedllm.engines.world import World
from fedllm.models.model import Model
from fedllm.runs.build import Parts
from fedllm.runs.judge import Judge, Metrics

MOST = 200
"""Clients up to which the nearest of each is looked for."""
LOCAL = ("in_process", "vectorized")
"""Engines whose clients' memories lie here, so that one can be lent to another. Nothing of it is part of the run."""


def views(parts: Parts, state: State, memory: Mapping[str, Mapping[str, Any]], own: Mapping[str, Metrics],
          round: int) -> dict[str, Any] | None:
    """`global` and `nearest`, each client -> metrics on its own test rows, and `whose` part was the nearest.

    `global`: the client has no part of its own, as one that was never trained. `nearest`: it has that of the client
    whose rows have the words most like its own, so that its own training does not count. None where clients keep
    nothing that their tests depend on, or where their memories are elsewhere. No message and no bytes of the run.
    """
    kept = {c: m for c, m in memory.items() if c != SERVER and m}
    far = parts.engine is not None or parts.recipe.engine.kind not in LOCAL
    if not kept or not own or far or parts.world.federation.streamed:
        return None
    judge = Judge(parts, parts.method)
    try:
        shared = judge.each_with(state, {}, round)
        if shared == own:
            return None
        whose = nearest(parts.world, list(kept))
        lent = judge.each_with(state, {c: dict(kept[other]) for c, other in whose.items()}, round) if whose else {}
    except FedLLMError:  # clients' parts fit only those whose they are (models of their own, sizes of their own)
        return None
    return {"global": shared, "nearest": {c: m for c, m in lent.items() if c in whose}, "whose": whose}


def nearest(world: World, having: list[str]) -> dict[str, str]:
    """Each client -> the other client with a part whose training rows' words are the most like its own: the least sum
    of |p_k(word) - p_j(word)|. Only clients with the same model and rank count; empty where rows are no words."""
    clients = {i.id: i.profile for i in world.infos()}
    wordless = not isinstance(world.model, Model) or world.model.tokenizer is None or world.federation.acts
    if len(clients) > MOST or wordless:
        return {}
    ids = {c: np.concatenate([row.ids for row in world.encoded(c, "train")]) for c in clients}
    if any(x.ndim != 1 or x.dtype.kind not in "iu" or not len(x) for x in ids.values()):
        return {}
    most = 1 + max(int(x.max()) for x in ids.values())
    words = {c: np.bincount(x, minlength=most) / len(x) for c, x in ids.items()}  # [vocabulary]
    out = {}
    for c, mine in clients.items():
        apart = {j: float(np.abs(words[c] - words[j]).sum()) for j in having if j != c and j in clients
                 and (clients[j].model, clients[j].rank) == (mine.model, mine.rank)}
        if apart:
            out[c] = min(sorted(apart), key=lambda j: apart[j])
    return out

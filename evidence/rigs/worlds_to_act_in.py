"""Rigs for methods that act: grid worlds with walls and a slip of each client's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedllm.core.program import drive
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines import Vectorized
from fedllm.engines.client import server_info
from fedllm.engines.world import World
from fedllm.environments.registry import bounded
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.policy import make_policy
from fedllm.spaces import make_space

SLIP = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]


def grid_worlds(method: str, seed: int, *, clients: int = 6, side: int = 5, walls: int = 4, rounds: int = 25,
                lr: float = 20.0, own: bool = True, max_steps: int = 40, knobs: Any = None) -> dict[str, float]:
    """`return` and `cut` of the policies that clients end with, each in its own world; `elsewhere`: in all the others.

    `local_only` is the same work without sharing. With `own` false all clients have the same walls.
    """
    alone = method == "local_only"
    told: dict[str, Any] = {"clients": clients, "max_steps": max_steps, "side": side, "walls": walls, "slip": SLIP}
    fed = environments("env:gridworld", EnvironmentSpec(**told, **({} if own else {"layout": seed})), seed)
    scene = bounded(fed.test[0], np.random.default_rng(0)).scene
    model = make_policy(scene.size, scene.actions, (), make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=lr), seed)
    m = make_method("fed_marl" if alone else method, **({"share": "nothing"} if alone else {}), **(knobs or {}))
    engine, state = Vectorized((m,), world), m.init(model)
    for t in range(rounds):
        engine.begin(t)
        state = drive(m.round(state, world.infos()), engine)
        engine.commit()
    engine.begin(rounds)
    each = drive(m.evaluate(state, world.infos(), "local"), engine)
    everywhere = drive(m.evaluate(state, world.infos() if alone else [server_info()], "global"), engine)
    mean = lambda got, name: float(np.mean([r[name] for r in got.values()]))  # noqa: E731
    return {"return": mean(each, "return"), "cut": mean(each, "cut"), "elsewhere": mean(everywhere, "return"),
            "work_rounds": float(rounds)}


RIGS = {"grid_worlds": grid_worlds}

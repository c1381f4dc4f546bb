"""Edge servers for virtual reality: what decision transformers return in servers that nobody has learned from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import SERVER
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall, server_info
from fedllm.engines.world import World
from fedllm.environments.registry import bounded, placed
from fedllm.local.logs import Habit, gathered, habit, lived
from fedllm.local.spec import LocalSpec
from fedllm.models.decider import make_decider
from fedllm.spaces import make_space

SERVERS, HELD_OUT, SLOTS, TESTED = 8, 6, 12, 6
"""Servers that learn, those that do not, slots of an episode, and episodes of a test in each."""


@functools.lru_cache(maxsize=16)
def servers(seed: int) -> Any:
    """The federation, each server with band, compute and penalty of its own."""
    return environments("env:edge_vr", EnvironmentSpec(clients=SERVERS, held_out=HELD_OUT, slots=SLOTS), seed)


def edge_servers(method: str, seed: int, *, rounds: int = 25, lr: float = 0.003, steps: int = 4, batch: int = 16,
                 width: int = 24, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """`normalized`: return in the held-out servers, 0 what chance returns there and 1 what the best steady allocation
    does, chosen in hindsight; the mean over servers, and over clients where each acts by its own weights.
    `over_equal_share` and `over_logs`: that, minus the same of equal shares and of logs."""
    torch.set_num_threads(1)
    fed = servers(seed)
    scene = bounded(fed.test[0], np.random.default_rng(0)).scene
    model = make_decider(scene.size, scene.actions, len(scene.cues()), width, 1, make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="adam", lr=lr, steps=steps, batch_size=batch), seed)
    told = {"context_len": 4, "prompt_len": 4, "test_episodes": TESTED, **(knobs or {})}
    trial = Trial(method, world, told).rounds(rounds)
    low, best, others = scale_of(seed)
    got = float(np.mean([(r - low) / (best - low) for r in returned(trial)]))
    return {"normalized": got, **{f"over_{name}": got - x for name, x in others.items()}, **trial.work()}


def returned(trial: Trial) -> list[np.ndarray]:
    """Mean return in each held-out server [held out], by the served weights, or by each client's own."""
    world, method = trial.world, trial.method
    call = ClientCall(server_info(), world, {}, trial.t, "score", 0, lambda r: carry_out([r], world.limits)[0])
    rows = world.rows(SERVER, "test")
    fronts = method.fronts(call, rows)
    thetas = [trial.state["theta"]] if method.serves else [m["theta"] for m in trial.engine.memory.values()]
    done = [call.decide(theta, TESTED, rows, fronts, context=method.context_len) for theta in thetas]
    return [np.array([e.total for e in some]).reshape(len(rows), TESTED).mean(1) for some in done]


@functools.lru_cache(maxsize=16)
def scale_of(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """What chance returns in each held-out server, what the best steady allocation does (on the episodes of the test),
    and between them equal shares and logs."""
    rows = servers(seed).test
    scene = bounded(rows[0], np.random.default_rng(0)).scene

    def mean(act: Habit) -> np.ndarray:
        envs, seeds = placed(rows, TESTED, np.random.default_rng(0))
        done = [lived(e, s, act, np.random.default_rng(s)).total for e, s in zip(envs, seeds, strict=True)]
        return np.array(done).reshape(len(rows), TESTED).mean(1)

    low = mean(habit(scene, "random"))
    best = np.stack([mean(lambda seen, rng, a=a: a) for a in range(scene.actions)]).max(0)
    rng = np.random.default_rng(2)
    logs = np.array([np.mean([e.total for e in gathered(bounded(row, rng), 32, rng, 0.1)]) for row in rows])
    others = {"equal_share": mean(habit(scene, "equal_share")), "logs": logs}
    return low, best, {name: float(((x - low) / (best - low)).mean()) for name, x in others.items()}


RIGS = {"edge_servers": edge_servers}

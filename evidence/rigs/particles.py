"""Experts that search for better ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.payload import add, scale
from fedllm.data.federation import Federation
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space


def particles(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 21) -> Metrics:
    """Six or more experts on the topics under label skew, 40 steps each, then a search by 64 public rows.

    `over_expert`: the best particle's loss on the IID test less that of the expert that is best on the public rows;
    `over_average`: less that of the experts' plain average; `utility_fell`: how often the best's f rose (never).
    """
    torch.set_num_threads(1)
    fed = topic_federation(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(fed.test))
    public, test = [fed.test[i] for i in order[:64]], [fed.test[i] for i in order[64:]]
    lora = make_space("lora", rank=4, alpha=8.0, targets=("query", "value"))
    model = Model(pretrained(seed), None, "classification", lora, labels=CLASSES, seed=seed)
    spec = LocalSpec(optimizer="adamw", lr=3e-3, steps=40, batch_size=16)
    world = World(model, Federation(fed.clients, test, "classification", CLASSES, public), spec, seed)
    run = Trial(method, world, dict(knobs or {})).rounds(1)
    experts = {c: m["x"] for c, m in run.engine.memory.items()}
    first = min(run.engine.memory, key=lambda c: run.engine.memory[c]["f"])
    mean = scale(next(iter(experts.values())), 0.0)
    for x in experts.values():
        mean = add(mean, x, 1 / len(experts))
    seen = [run.state["f"]["best"]]
    for _ in range(rounds - 1):
        seen.append(run.rounds(1).state["f"]["best"])

    def loss(theta: Any) -> float:
        return run_losses([Losses("x", model, theta, None, test)], Limits())[0].mean

    best = loss(run.state["best"])
    return {"over_expert": best - loss(experts[first]), "over_average": best - loss(mean), "loss": best,
            "utility_fell": float(sum(b > a for a, b in itertools.pairwise(seen)))}


RIGS: dict[str, Callable[..., Metrics]] = {"particles": particles}

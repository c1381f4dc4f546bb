"""Clients who come when training is over, and adapt in a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space


def newcomers(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 20,
              local: Mapping[str, Any] | None = None) -> Metrics:
    """Eight clients with label skew, of whom six train; `adapted_loss`: of the other two after five SGD steps of the
    same rate on rows of their own, on test rows of their own, the mean."""
    torch.set_num_threads(1)
    fed = topic_federation(seed)
    lora = make_space("lora", rank=4, alpha=8.0, targets=("query", "value"))
    model = Model(pretrained(seed), None, "classification", lora, labels=CLASSES, seed=seed)
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": 5, "batch_size": 16, **(local or {})})
    world = World(model, fed, spec, seed)
    run = Trial(method, world, dict(knobs or {})).rounds(rounds, world.infos()[:6])
    theta, losses = run.method.served(run.state)[0], []
    for c in world.infos()[6:]:
        rows, test = list(fed.clients[c.id].train), list(fed.clients[c.id].test)
        rng = numpy_stream(seed, "newcomer", c.id)
        plan = [rng.choice(len(rows), min(16, len(rows)), replace=False) for _ in range(5)]
        [fitted] = run_fits([Fit(c.id, model, theta, None, rows, plan, spec)], Limits())
        losses.append(run_losses([Losses(c.id, model, fitted.theta, None, test)], Limits())[0].mean)
    return {"adapted_loss": float(np.mean(losses)), **run.work()}


RIGS: dict[str, Callable[..., Metrics]] = {"newcomers": newcomers}

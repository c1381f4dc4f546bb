"""Claims on what is trained: two streams of which one stays at home, and slices where nobody can hold the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Metrics, Trial
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.spaces.space import Space


def two_streams(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 15,
                local: Mapping[str, Any] | None = None) -> Metrics:
    """Topic classification, eight clients by Dirichlet(0.1) over eight labels: all weights of a pre-trained encoder and
    its head are trained; `fedlora_wu` has a personal LoRA over them, other methods have them alone.

    `local_*` on rows drawn with each client's own label mix, `global_*` on the IID test, each client with its model.
    """
    of = {"sigma": "full", "tau": {"name": "lora", "rank": 4, "alpha": 8.0, "targets": "all-linear"}}
    space = make_space("streams", of=of, personal=("tau",)) if method == "fedlora_wu" else make_space("full")
    return topic_run(method, seed, space, knobs, rounds, {"lr": 2e-3, "steps": 10, "batch_size": 16, **(local or {})})


def small_to_large(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 30,
                   local: Mapping[str, Any] | None = None) -> Metrics:
    """The same with Dirichlet(1) and a whole model that no client can hold, where the method sends slices of it.

    For `fedbrb` also `over_static`: its loss on the IID test above that of clients which always have the same slice
    (HeteroFL's), on the same work.
    """
    spec = {"lr": 2e-3, "steps": 10, "batch_size": 16, **(local or {})}
    out = topic_run(method, seed, make_space("full"), knobs, rounds, spec, 1.0)
    if method == "fedbrb":
        still = {**(knobs or {}), "rolling": "static", "broadcast_weight": 0.0}
        static = topic_run(method, seed, make_space("full"), still, rounds, spec, 1.0)
        out |= {"over_static": out["global_loss"] - static["global_loss"], "static_loss": static["global_loss"]}
    return out


def topic_run(method: str, seed: int, space: Space, knobs: Mapping[str, Any] | None, rounds: int,
              local: Mapping[str, Any], alpha: float = 0.1) -> Metrics:
    """Some rounds of topic classification with this space on a pre-trained encoder."""
    torch.set_num_threads(1)
    fed = topic_federation(seed, alpha=alpha)
    model = Model(pretrained(seed), None, "classification", space, labels=CLASSES, seed=seed)
    run = Trial(method, World(model, fed, LocalSpec(**{"optimizer": "adamw", **local}), seed), dict(knobs or {}))
    run.rounds(rounds)
    sent = [e for e in run.engine.record.events if e["kind"] == "wire" and e["phase"].endswith(".local")]
    out = {f"{way}_bytes": float(max((e["bytes"] for e in sent if e["direction"] == way), default=0))
           for way in ("up", "down")}
    for on in ("global", "local"):
        scores = run.scores(on).values()
        out |= {f"{on}_{m}": float(np.mean([s[m] for s in scores])) for m in ("loss", "accuracy")}
    return {**out, **run.work()}


RIGS: dict[str, Callable[..., Metrics]] = {"two_streams": two_streams, "small_to_large": small_to_large}

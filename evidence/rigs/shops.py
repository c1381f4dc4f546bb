"""Recommenders: two simulated shops that share words alone, and segments of one shop's users."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.data.load import load_federation
from fedllm.data.simulated.shops import NAMES
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.made import Made, make_net
from fedllm.models.model import Model
from fedllm.spaces import make_space

BY = Made(width=32, depth=1, codes=(8, 16), prompts=16)


@functools.lru_cache(maxsize=8)
def federation(seed: int, key: str, **knobs: Any) -> Any:
    """Interactions of simulated shops; of each user the last item is its client's test."""
    return load_federation({"source": "sim:shops", "simulated": knobs, "task": "next_item", "sequences": {},
                            "test": 0.0, "client_test": 0.5, "partition": {"kind": "by_key", "key": key}}, seed)


def by_rule(world: World, name: str, pooled: bool) -> dict[str, float]:
    """NDCG@10 of a rule at each client, learned from its own rows or from all."""
    rules, every = world.model.rules, [e for c in world.federation.clients for e in world.encoded(c, "train")]
    return {c: rules.by_rule(name, every if pooled else world.encoded(c, "train"), world.encoded(c, "test"),
                             world.model.labels)["ndcg10"] for c in world.federation.clients}


def shops(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12, lr: float = 1e-2,
          mixed: str = "", tuned: bool = False) -> Metrics:
    """`ndcg10` and `hr10` of each shop (`large_`, `small_`) on its users' last items, and how much the small shop's
    NDCG@10 is above that of popularity and of item-kNN there. `tuned`: five rounds of prompts come after."""
    torch.set_num_threads(1)
    fed = federation(seed, "shop", mixed=mixed)
    model = make_net("shop", Made(**{**vars(BY), "labels": fed.labels}), make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="adam", lr=lr, steps=10, batch_size=32), seed)
    trial = Trial(method, world, {"fed_rounds": rounds, **(knobs or {})}).rounds(rounds + 5 * tuned)
    got = trial.scores("local")
    out = {f"{size}_{m}": got[name][m] for size, name in zip(("large", "small"), NAMES, strict=False)
           for m in ("ndcg10", "hr10")}
    return {**out, **{f"over_{rule}": out["small_ndcg10"] - by_rule(world, rule, False)[NAMES[1]]
                      for rule in model.rules.rules}, **trial.work()}


@functools.lru_cache(maxsize=8)
def pretrained(seed: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Segments of a shop's users, and a recommender that has learned of a tenth as many users who are no client's."""
    fed = federation(seed, "segment", shops=1, users=160)
    open_ = federation(seed, "shop", shops=1, users=160)
    every = next(iter(open_.clients.values())).train
    model = net(seed, fed.labels, "full")
    some = type(open_)({"public": type(next(iter(open_.clients.values())))(every[:: 10])}, [], "next_item", fed.labels)
    spec = LocalSpec(optimizer="adam", lr=1e-2, steps=60, batch_size=32)
    state = Trial("fedavg", World(model, some, spec, seed), {}).rounds(1).state
    return fed, state["theta"]


def net(seed: int, labels: tuple[str, ...], space: str, **knobs: Any) -> Model:
    """The recommender without prompts: those belong to PFCR."""
    return make_net("shop", Made(**{**vars(BY), "labels": labels, "branch": False}), make_space(space, **knobs),
                    seed=seed)


def segments(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 10, lr: float = 1e-2
             ) -> Metrics:
    """`ndcg10` and `hr10` on each segment's users' last items: the mean over segments, and `worst_ndcg10`;
    `over_item_knn`: the mean above that of item-kNN of all users."""
    torch.set_num_threads(1)
    fed, start = pretrained(seed)
    model = net(seed, fed.labels, "lora", rank=8, modules_to_save=())
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.copy_(start[name])
    world = World(model, fed, LocalSpec(optimizer="adam", lr=lr, steps=10, batch_size=16), seed)
    trial = Trial(method, world, dict(knobs or {})).rounds(rounds)
    got = trial.scores("local").values()
    mean = {m: float(np.mean([s[m] for s in got])) for m in ("ndcg10", "hr10", "loss")}
    return {**mean, "worst_ndcg10": min(s["ndcg10"] for s in got), **trial.work(),
            **{f"over_{rule}": mean["ndcg10"] - float(np.mean(list(by_rule(world, rule, True).values())))
               for rule in model.rules.rules}}


RIGS = {"shops": shops, "segments": segments}

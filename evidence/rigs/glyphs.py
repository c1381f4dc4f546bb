"""Clients of pictures, of texts and of both, over glyphs with captions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.program import drive
from fedllm.data.load import load_federation
from fedllm.data.simulated.glyphs import SHAPES
from fedllm.engines.client import server_info
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.made import Made, make_net
from fedllm.spaces import make_space


@functools.lru_cache(maxsize=8)
def federation(seed: int, clients: int = 6, rows: int = 96, skew: float = 2.0) -> Any:
    """Two clients of each kind; a third of a client's rows are its test."""
    simulated = {"clients": clients, "rows": rows, "skew": skew, "noise": 0.3}
    return load_federation({"source": "sim:glyphs", "public": "sim:glyphs", "test": "sim:glyphs", "task": "pairs",
                            "simulated": simulated, "labels": list(SHAPES), "client_test": 0.34,
                            "partition": {"kind": "by_key", "key": "client"}}, seed)


def world_of(seed: int, space: str, local: Mapping[str, Any], depth: int = 1, **knobs: Any) -> World:
    """Width 24; sixteen rows a step."""
    model = make_net("pairs", Made(24, depth, SHAPES, prompts=2), make_space(space), seed=seed)
    spec = LocalSpec(**{"optimizer": "adam", "lr": 3e-3, "steps": 5, "batch_size": 16, **local})
    return World(model, federation(seed, **knobs), spec, seed)


def glyphs(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12, lr: float = 3e-3
           ) -> Metrics:
    """`r1`: how often the nearest caption of a picture is its own, by the server's model on pairs that nobody has;
    `accuracy`: the mean over clients on their own last rows."""
    torch.set_num_threads(1)
    trial = Trial(method, world_of(seed, "full", {"lr": lr}), {"server_steps": 10, **(knobs or {})}).rounds(rounds)
    served = drive(trial.method.evaluate(trial.state, [server_info()], "global"), trial.engine)
    return {"r1": next(iter(served.values()))["r1"],
            "accuracy": float(np.mean([s["accuracy"] for s in trial.scores("local").values()])), **trial.work()}


def glyphs_bytes(method: str, seed: int) -> Metrics:
    """`deep_over_shallow`: bytes up of clients of six blocks by those of one."""
    torch.set_num_threads(1)
    up = [Trial(method, world_of(seed, "full", {"steps": 1}, depth, clients=3, rows=12),
                {"server_steps": 1, "contrast_steps": 1}).rounds(1).engine.record.totals()["up"] for depth in (6, 1)]
    return {"deep_over_shallow": up[0] / up[1]}


def kinds_of_clients(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 15,
                     lr: float = 3e-3) -> Metrics:
    """`accuracy`: the mean over the kinds of clients on their own test rows; each kind's beside."""
    torch.set_num_threads(1)
    trial = Trial(method, world_of(seed, "complement", {"lr": lr}), dict(knobs or {})).rounds(rounds)
    got = trial.scores("local")
    each = {kind: float(np.mean([s["accuracy"] for c, s in got.items() if c.startswith(kind)]))
            for kind in ("image", "text", "pair")}
    return {"accuracy": float(np.mean(list(each.values()))), **{f"{k}_accuracy": v for k, v in each.items()},
            "loss": float(np.mean([s["loss"] for s in got.values()])), **trial.work()}


RIGS = {"glyphs": glyphs, "glyphs_bytes": glyphs_bytes, "kinds_of_clients": kinds_of_clients}

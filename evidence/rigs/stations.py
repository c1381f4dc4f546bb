"""Simulated weather stations of a few climates: prompts for a forecaster that all have learned by filling in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.payload import tensor_bytes
from fedllm.data.load import load_federation
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.made import Made, make_net
from fedllm.spaces import make_space

OF = ("temperature", "pressure", "humidity", "wind")
PAST, HORIZON, PRETRAINED = 12, 6, 60
SIZES = {"past": PAST, "horizon": HORIZON, "variables": len(OF), "target": 0}


@functools.lru_cache(maxsize=16)
def stations_of(seed: int, stations: int = 12, climates: int = 3, steps: int = 200) -> Any:
    """The federation: each station's windows, of which the last are its test."""
    return load_federation({
        "source": "sim:stations", "simulated": {"stations": stations, "climates": climates, "steps": steps,
                                                "variables": len(OF)},
        "task": "forecast", "test": 0.0, "client_test": 0.35, "partition": {"kind": "by_key", "key": "series"},
        "windows": {"of": list(OF), "time": "hour", "series": "station", "past": PAST, "horizon": HORIZON}}, seed)


def world_of(seed: int, local: Mapping[str, Any]) -> World:
    """Width 16, one block; eight windows a step."""
    model = make_net("series", Made(16, 1, sizes=SIZES), make_space("full"), seed=seed)
    spec = LocalSpec(**{"optimizer": "adam", "lr": 3e-3, "steps": 5, "batch_size": 8, **local})
    return World(model, stations_of(seed), spec, seed)


@functools.lru_cache(maxsize=16)
def filled_in(seed: int) -> Any:
    """The state after the rounds of imputation, which no knob of the prompts' rounds changes."""
    return Trial("metepfl", world_of(seed, {"lr": 0.01}), {"pretrain_rounds": PRETRAINED}).rounds(PRETRAINED).state


def stations(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 20, lr: float = 0.01
             ) -> Metrics:
    """`mae` of each station by its own prompts on its last windows, the mean over stations; `over_persistence` and
    `over_linear_ar`: by the mean of what these rules err there, each learned at its station."""
    torch.set_num_threads(1)
    world = world_of(seed, {"lr": lr})
    trial = Trial(method, world, {"pretrain_rounds": PRETRAINED, **(knobs or {})})
    trial.state, trial.t = copy.copy(filled_in(seed)), PRETRAINED
    got = trial.rounds(rounds).scores("local")
    mae = float(np.mean([s["mae"] for s in got.values()]))
    rules = world.model.rules
    other = {name: float(np.mean([rules.by_rule(name, world.encoded(c, "train"), world.encoded(c, "test"), ())["mae"]
                                  for c in got])) for name in rules.rules}
    return {"mae": mae, "rmse": float(np.mean([s["rmse"] for s in got.values()])),
            **{f"over_{name}": mae / v for name, v in other.items()}, **trial.work()}


def stations_bytes(method: str, seed: int, *, width: int = 128, depth: int = 4) -> Metrics:
    """`of_encoder`: tensors of one client's upload in a round of prompts, by those of a round of the encoder."""
    model = make_net("series", Made(width, depth, sizes={"past": 12, "horizon": 15, "variables": 12, "target": 0}),
                     make_space("full"), seed=seed)
    state = Trial(method, World(model, stations_of(seed)), {}).state
    return {"of_encoder": tensor_bytes(state["prompt"]) / tensor_bytes(state["encoder"])}


RIGS = {"stations": stations, "stations_bytes": stations_bytes}

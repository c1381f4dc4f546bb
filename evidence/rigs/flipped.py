"""Ten clients under label skew, some of which have turned labels: what it is worth to weigh them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.parts import LEVELS, WORDS, encoder
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.payload import norm, part
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS

CLIENTS, KINDS, ROWS = 10, 4, 48


def texts(rng: np.random.Generator, y: np.ndarray, centers: np.ndarray) -> list[Row]:
    """A row for each class in `y`: twelve words on three readings that lie about the class's own."""
    x = centers[y] + rng.normal(0, 0.6, (len(y), 3))
    at = rng.integers(0, 3, (len(y), WORDS))
    level = np.clip(np.round(1.5 * (np.take_along_axis(x, at, 1) + rng.normal(0, 0.5, at.shape)) + 2.5), 0,
                    LEVELS - 1).astype(int)
    return [{"text": " ".join(f"0{'abc'[a]}{v}" for a, v in zip(*one, strict=True)), "label": int(c)}
            for c, *one in zip(y, at, level, strict=True)]


class Watched(Vectorized):
    """Keeps how far each client's step went, on the mean of the last round."""

    went: list[float]

    def cross(self, way, job, msg):
        if way == "up" and (delta := part(msg, "delta")):
            self.went = [*self.__dict__.get("went", []), float(norm(delta))]
        return super().cross(way, job, msg)


def flipped(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, flip: int = 3, rounds: int = 40,
            local: Mapping[str, Any] | None = None, alone: bool = False, pooled: bool = False) -> Metrics:
    """`accuracy` on the IID test; `flipped_weight`: K times the mean weight of the clients whose labels are one on, in
    the last 10 rounds; `drift`: how far a client's step goes, on the mean of the last round; `off_fedavg`: by how much
    the model differs from FedAvg's; `again`: weights that are others when the last round is done again from a copy of
    the state before it. `right` is the accuracy, or `alone` the mean of models that learn alone, or `pooled` that of
    one with all rows.
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "flipped")
    centers, turned = rng.normal(0, 1, (KINDS, 3)), set(rng.choice(CLIENTS, flip, replace=False).tolist())
    shards = {}
    for k in range(CLIENTS):
        rows = texts(rng, rng.choice(KINDS, ROWS, p=rng.dirichlet([1.0] * KINDS)), centers)
        shards[f"client-{k}"] = Shard([{**r, "label": (r["label"] + 1) % KINDS} for r in rows] if k in turned else rows)
    fed = Federation(shards, texts(rng, rng.integers(0, KINDS, 400), centers), "classification", tuple("wxyz"),
                     texts(rng, rng.integers(0, KINDS, 100), centers))
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 6, "batch_size": 16, **(local or {})})
    world = World(encoder(seed), fed, spec, seed)
    if alone or pooled:
        if pooled:
            fed = replace(fed, clients={"all": Shard([r for s in shards.values() for r in s.train])})
            world = replace(world, federation=fed, local=replace(spec, steps=spec.steps * CLIENTS))
        got = Trial("local_only" if alone else "fedavg", world, {}).rounds(rounds).scores("global")
        return {"right": float(np.mean([s["accuracy"] for s in got.values()]))}
    run, mine = Trial(method, world, dict(knobs or {}), Watched), []
    for r in range(rounds):
        before = run.state
        run.rounds(1)
        if run.state.get("p") and r >= rounds - 10:
            mine.append(CLIENTS * np.mean([run.state["p"][f"client-{k}"] for k in turned or range(CLIENTS)]))
    right = float(run.scores("global")[next(iter(shards))]["accuracy"])
    out = {"accuracy": right, "right": right, "drift": float(np.mean(
        run.engine.went[-CLIENTS:])), "flipped_weight": float(np.mean(mine)) if mine else 1.0, **run.work()}
    if "agent" in METHODS[method].knobs():
        if dict(knobs or {}).get("agent") == "off":
            plain = Trial("fedavg", world, {}, Watched).rounds(rounds).state["theta"]
            out["off_fedavg"] = max(float((plain[n] - t).abs().max()) for n, t in run.state["theta"].items())
        last, chosen = run.t, run.state["p"]
        run.state, run.t = copy.deepcopy(before), last - 1
        again = run.rounds(1).state["p"]
        out["again"] = float(sum(again[c] != w for c, w in chosen.items()))
    return out


RIGS = {"flipped": flipped}

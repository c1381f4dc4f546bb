"""Rigs of pre-training methods: what each sends in bytes, and time on a fleet of unequal workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evidence.rigs.time import Race
from evidence.rigs.trials import Metrics, Trial, _chain, _tiny_llama
from fedllm.core.client import Fleet, Profile
from fedllm.core.payload import Tree
from fedllm.engines.carry import carry_out
from fedllm.engines.world import World
from fedllm.local.requests import Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space


def wire(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, hidden: int = 128,
         cycle: int = 2) -> Metrics:
    """Two layers of width 128 from random weights, four clients, a step a round: bytes of one client once all hold the
    model. `peak_up` and `peak_down` are the largest message, `cycle` both ways together of `cycle` rounds (for methods
    that send all at once: of one), `payload_up` the whole upload of a cycle."""
    torch.set_num_threads(1)
    model = Model(_tiny_llama(hidden, seed), None, "generation", make_space("full"), seed=seed)
    world = World(model, _chain(seed), LocalSpec(lr=1e-3, steps=1, batch_size=8), seed, exact_match=False)
    run = Trial(method, world, dict(knobs or {})).rounds(2 * cycle)
    parts = int((knobs or {}).get("fragments", 1))
    last = [e for e in run.engine.record.events if e["kind"] == "wire" and e["client"] == "client-0"
            and 2 * cycle - parts <= e["round"]]
    by = {way: [float(e["bytes"]) for e in last if e["direction"] == way] for way in ("up", "down")}
    return {"peak_up": max(by["up"]), "peak_down": max(by["down"]), "cycle": sum(by["up"]) + sum(by["down"]),
            "payload_up": sum(by["up"]), "clients": float(len(world.infos())),
            "numbers": float(np.sum([t.numel() for t in model.initial().values()]))}


SPEEDS = (1.0, 1.0, 2.0, 4.0)


def workers(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, lr: float = 1e-3, steps: int = 12,
            target: float = 2.4, horizon: float = 96.0, speeds: Sequence[float] = SPEEDS) -> Metrics:
    """Four workers of speeds 1, 1, 2 and 4 (or `speeds`) pre-train a tiny Llama, 12 steps of the quickest at a time (a
    step takes a second at speed 1): virtual `seconds` until the loss on held-out rows is below `target` (never: three
    times the horizon), and by how much it fell in the horizon of 96 seconds (`fall`, over the last tested state)."""
    torch.set_num_threads(1)
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    fed = _chain(seed)
    profiles = {c: Profile(speed=s) for c, s in zip(fed.clients, speeds, strict=True)}
    spec = LocalSpec(optimizer="adamw", lr=lr, steps=steps, batch_size=8)
    race = Race(method, World(model, fed, spec, seed, profiles, fleet=Fleet(), exact_match=False), len(speeds),
                dict(knobs or {}))
    rows: Any = fed.test

    def loss(theta: Tree) -> float:
        return carry_out([Losses("held", model, theta, None, rows)], race.world.limits)[0].mean

    before, last, seconds = loss(race.theta), 0.0, 3 * horizon
    while race.engine.clock.now < horizon or (seconds == 3 * horizon and race.engine.clock.now < 3 * horizon):
        race.round()
        at = race.engine.clock.now
        now = loss(race.theta)
        last = before - now if at <= horizon + 1e-9 else last
        seconds = min(seconds, at) if now <= target else seconds
    return {"seconds": seconds, "fall": last, "rounds": float(race.t)}


def elastic(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, local: Mapping[str, Any] | None = None,
            away: tuple[int, int] = (2, 5), rounds: int = 10) -> Metrics:
    """Four workers, of which the last is not there from window `away[0]` to before `away[1]`: by how much the loss
    fell, and `healing`, the seconds that the round takes beyond its window over the window's own (virtual time, lines
    of 1 MB/s); `windows` that it missed after it was back, and `undone` ones."""
    torch.set_num_threads(1)
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    fed = _chain(seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 12, "batch_size": 8, **(local or {})})
    profiles = {c: Profile(bandwidth=1e6) for c in fed.clients}
    world = World(model, fed, spec, seed, profiles, fleet=Fleet(step_seconds=0.5), exact_match=False)
    run, infos = Trial(method, world, dict(knobs or {})), world.infos()
    before = np.mean([s["loss"] for s in run.scores("global").values()])
    for t in range(rounds):
        run.rounds(1, infos[:-1] if away[0] <= t < away[1] else infos)
    fall = before - np.mean([s["loss"] for s in run.scores("global").values()])
    events = run.engine.record.events
    clocks = [e["seconds"] for e in events if e["kind"] == "clock" and e["round"] == away[1] and "score" not in
              e["phases"][0]]
    worked = {e["round"] for e in events if e["kind"] == "wire" and e["client"] == infos[-1].id
              and e["direction"] == "up" and e["phase"].endswith("local")}
    return {"fall": float(fall), "healing": sum(clocks[1:]) / clocks[0] if clocks else 0.0,
            "windows": float(min((t for t in worked if t >= away[1]), default=rounds) - away[1]),
            "undone": float(run.state.get("undone", 0)), **run.work()}


RIGS: dict[str, Callable[..., Metrics]] = {"wire": wire, "workers": workers, "elastic": elastic}

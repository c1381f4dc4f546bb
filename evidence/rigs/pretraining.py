"""Rigs of pre-training methods: what each sends in bytes, and time on a fleet of unequal workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial, _chain, _tiny_llama
from fedllm.engines.world import World
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


RIGS: dict[str, Callable[..., Metrics]] = {"wire": wire}

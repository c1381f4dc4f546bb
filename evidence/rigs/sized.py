"""Devices of unlike memory that tune a model of which each holds an emulator of its own size, and who may choose it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.boundary import blank, chain, owned, plug_in, tuned, walks
from evidence.rigs.trials import Metrics
from fedllm.core.client import Fleet, Profile
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods._control import OUT, Scene
from fedllm.methods._sizes import needed
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space

DEPTH, STEPS, DEVICES = 7, 160, 6
LINE = 50_000.0
"""Bytes a second of every device."""


def sized(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 4,
          local: Mapping[str, Any] | None = None, space: Mapping[str, Any] | None = None) -> Metrics:
    """Six devices tune a Llama of seven blocks, pre-trained on walks of a public chain; theirs follow another.

    Two have the memory for an emulator of one block between the ends, two for two blocks, and two for four. `plugin` is
    the loss of the owner's whole model on the global test, `base` before; `bytes` and `seconds` (virtual) are those of
    the rounds, `refused` how often a device would not do what it was asked.
    """
    torch.set_num_threads(1)
    net = blank(seed, DEPTH)
    net.load_state_dict(owned(seed, STEPS, DEPTH))
    model = Model(net, None, "generation", make_space(**{"name": "lora", **(space or {"rank": 8})}), seed=seed)
    rng, after = numpy_stream(seed, "sized"), chain(seed, 0.4)
    shards = {f"client-{k}": Shard(walks(rng, after, 64), walks(rng, after, 8)) for k in range(DEVICES)}  # type: ignore[arg-type]
    fed = Federation(shards, walks(rng, after, 120), "generation", (), walks(rng, chain(seed), 200))  # type: ignore[arg-type]
    spec = LocalSpec(**{"lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    world = World(model, fed, spec, seed, _profiles(seed, net), exact_match=False, fleet=Fleet())
    run = tuned(method, world, dict(knobs or {}), rounds)
    wire = run.engine.record.totals()
    refused = [e for e in run.engine.record.events if e["kind"] == "missing" and "memory_bytes" in e["why"]]
    return {"base": plug_in(world, model.initial()), "plugin": plug_in(world, run.method.served(run.state)[0]),
            "bytes": float(wire["up"] + wire["down"]), "seconds": float(run.engine.clock.now),
            "refused": float(len(refused)), **run.work()}


def _profiles(seed: int, net: Any) -> dict[str, Profile]:
    """Memory for just the weights and the moments of each of three sizes, in turn."""
    like = Model(net, None, "generation", make_space("lora", rank=8), seed=seed)
    state = make_method("fedpeat", bottom_layers=1, adapter_layers=1, ratios=(0.2, 0.4, 0.8)).init(like)
    memory = [needed(state["weights"], kept) for kept in state["kept"]]
    return {f"client-{k}": Profile(memory_bytes=memory[k % 3], bandwidth=LINE) for k in range(DEVICES)}


def fleet_game(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, devices: int = 8,
               rounds: int = 400) -> Metrics:
    """A controller alone, on devices that train nothing: `reward` is its mean over the last 100 rounds.

    Sizes 0.25, 0.5, 0.75; memory for one, two or all of them; speeds 2^N(0, 1), lines with exponential fading. Losses
    fall with the mean size of those who take part (0.8 sqrt) and rise with the share that rests (0.5). `greedy` is
    what the largest that fits is worth in the same rounds.
    """
    torch.set_num_threads(1)
    ours, greedy = make_method(method, **(knobs or {})), make_method(method, controller="greedy")
    rng, ratios = numpy_stream(seed, "fleet game"), np.array([0.25, 0.5, 0.75])
    fits = np.arange(3) <= rng.integers(0, 3, (devices, 1))
    speed = 2.0 ** rng.normal(0, 1, devices)
    memory: Any = ours.controls().begin(5, 3, seed)
    got, theirs, loss = [], [], 1.5
    for t in range(rounds):
        line = rng.exponential(1.0, devices).clip(0.05)
        seconds = 10 * ratios / speed[:, None] + 2 / line[:, None]
        seen = np.stack([fits.sum(1) / 3 - 1, np.log10(1 + 2 / line), np.log2(speed) / 4, np.zeros(devices),
                         np.full(devices, loss)], 1)
        scene = Scene(fits, seconds, seen.clip(-3, 3))

        def paid(choice: np.ndarray, at: Scene = scene) -> tuple[float, float]:
            on = choice != OUT
            value = 1.5 - 0.8 * np.sqrt(ratios[choice[on]]).mean() + 0.5 * (1 - on.mean())
            took = at.seconds[np.flatnonzero(on), choice[on]].max()
            return float(value), ours.reward(float(value), float(took), float(1 - on.mean()))

        choice, memory = ours.controls().choose(memory, scene, numpy_stream(seed, "choices", t))
        loss, reward = paid(choice)
        memory = ours.controls().learn(memory, reward)
        got.append(reward)
        theirs.append(paid(greedy.controls().choose({}, scene, rng)[0])[1])
    return {"reward": float(np.mean(got[-100:])), "greedy": float(np.mean(theirs[-100:])),
            "first": float(np.mean(got[:100]))}


RIGS = {"sized": sized, "fleet_game": fleet_game}

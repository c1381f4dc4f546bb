"""A small model that its owner keeps the middle of: what tuning both of its ends over an emulator is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.boundary import blank, chain, owned, plug_in, tuned, walks
from evidence.rigs.trials import Metrics
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

DEPTH, STEPS = 7, 160


def both_ends(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 4,
              local: Mapping[str, Any] | None = None, whole: bool = False) -> Metrics:
    """Three clients tune a Llama of seven blocks, pre-trained on walks of a public chain; theirs follow another.

    Losses on the global test: `base` before, `plugin` with A in the whole model, `emulator` for what clients hold.
    `margin` = emulator - plugin, `gap` its size; with `whole`, `order` = min(base - plugin, plugin - whole).
    """
    torch.set_num_threads(1)
    net = blank(seed, DEPTH)
    net.load_state_dict(owned(seed, STEPS, DEPTH))
    model = Model(net, None, "generation", make_space("lora", rank=8), seed=seed)
    rng, after = numpy_stream(seed, "both ends"), chain(seed, 0.4)
    shards = {f"client-{k}": Shard(walks(rng, after, 64), walks(rng, after, 8)) for k in range(3)}  # type: ignore[arg-type]
    fed = Federation(shards, walks(rng, after, 120), "generation", (), walks(rng, chain(seed), 200))  # type: ignore[arg-type]
    spec = LocalSpec(**{"lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    world, told = World(model, fed, spec, seed, exact_match=False), dict(knobs or {})
    run = tuned(method, world, told, rounds)
    out: Metrics = {"base": plug_in(world, model.initial()), "plugin": plug_in(world, run.method.served(run.state)[0]),
                    "emulator": float(np.mean([s["loss"] for s in run.scores("global").values()])), **run.work()}
    out |= {"margin": out["emulator"] - out["plugin"], "gap": abs(out["emulator"] - out["plugin"])}
    if whole:
        full = tuned(method, world, {**told, "drop_ratio": 0.0, "prealign_steps": 0}, rounds)
        out["whole"] = plug_in(world, full.method.served(full.state)[0])
        out["order"] = min(out["base"] - out["plugin"], out["plugin"] - out["whole"])
    return out


RIGS = {"both_ends": both_ends}

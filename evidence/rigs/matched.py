"""Public text of which little is like private text: what a model that clients tuned under privacy finds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.audit import bound_layers
from evidence.rigs.styles import chains, net, reader, said, texts
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import SERVER
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses, run_probes
from fedllm.local.requests import Losses, Probe
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

CLIENTS, PUBLIC = 20, 300
KNOBS = {"public_steps": 40, "match_rounds": 3, "keep": 0.05}


def matched(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 5,
            noise: float | None = None, local: Mapping[str, Any] | None = None) -> Metrics:
    """Twenty clients with chat; of 300 public rows 15 are chat and the rest articles.

    `precision` of what is kept, `over_alone` how much more it is than by the private model's likelihood alone, `loss`
    on fresh chat in the end. `noise`: the multiplier of dp_fedavg (None: no layer).
    """
    torch.set_num_threads(1)
    rng, (article, chat) = numpy_stream(seed, "matched"), chains(seed)
    rows = lambda after, n: [{"prompt": "", "response": t} for t in said(texts(rng, after, n))]  # noqa: E731
    like = PUBLIC // 20
    public = [*rows(article, PUBLIC - like), *rows(chat, like)]
    fed = Federation({f"client-{k}": Shard(rows(chat, 6)) for k in range(CLIENTS)}, rows(chat, 120), "generation", (),
                     public)
    model = Model(net(seed + 1, 32), reader(), "generation", make_space("full"), seed=seed)
    spec = LocalSpec(**{"lr": 3e-3, "steps": 4, "batch_size": 6, "max_length": 16, **(local or {})})
    dp = {"noise_multiplier": noise, "clip_norm": 1.0}
    layers = bound_layers(("dp_fedavg",), CLIENTS, 6, spec, seed, rounds, dp) if noise else []
    world = World(model, fed, spec, seed, exact_match=False)
    run = Trial(method, world, {**KNOBS, **(knobs or {})}, layers=layers)
    before: Any = {}
    for t in range(rounds):
        if t == run.method.match_rounds:
            before = run.state["theta"]
        run.rounds(1)
    kept = run.state["kept"]
    [end] = run_losses([Losses("x", model, run.state["theta"], None, world.encoded(SERVER, "test"))], world.limits)
    out: Metrics = {"loss": end.mean, **run.work()}
    if kept:
        alone = run_probes([Probe("x", model, before, None, world.encoded(SERVER, "public"), (before,))],
                           world.limits)[0][0]
        best = np.argsort(alone.total / alone.count, kind="stable")[: len(kept)]
        good = lambda some: float(np.mean([i >= PUBLIC - like for i in some]))  # noqa: E731
        out |= {"precision": good(kept), "over_alone": good(kept) - good(best)}
    return out


RIGS = {"matched": matched}

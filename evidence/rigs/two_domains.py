"""Public rows in plain words at the server, private ones in a code that all clients share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.shift import coded, encoder_of
from evidence.rigs.topics import CLASSES, documents, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space


def two_domains(method: str, seed: int, *, space: Mapping[str, Any] | None = None, rounds: int = 8,
                knobs: Mapping[str, Any] | None = None, local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 60 documents whose words are half in a code, 160 public documents in plain words.

    `private_loss` of the shared model on 200 documents in the code, `public_loss` on 200 in plain words.
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "two domains")
    words, code = topics(rng, len(CLASSES)), coded(rng, 0.5)

    def write(n: int, private: bool) -> list[Any]:
        made = documents(rng, words, rng.permutation(np.arange(n) % len(CLASSES)), 0.35)
        return [replace(e, ids=code[e.ids]) for e in made] if private else list(made)

    fed = Federation({f"client-{k}": Shard(write(60, True)) for k in range(4)}, write(200, True), "classification",
                     CLASSES, write(160, False))
    made = dict(space or {"name": "full"})
    model = encoder_of(seed, make_space(made.pop("name"), **made), 2)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-3, "steps": 10, "batch_size": 16, **(local or {})})
    run = Trial(method, World(model, fed, spec, seed), dict(knobs or {})).rounds(rounds)
    theta, plain = run.method.served(run.state)[0], write(200, False)
    private, public = (run_losses([Losses("x", model, theta, None, rows)], Limits())[0].mean
                       for rows in (list(fed.test), plain))
    return {"private_loss": private, "public_loss": public, **run.work()}


RIGS = {"two_domains": two_domains}

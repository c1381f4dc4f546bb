"""Two axes of a prompt that clients tune at home: their own rows, and everybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.ruled import silos, started
from evidence.rigs.trials import Metrics, Trial
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space


def profit(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
           local: Mapping[str, Any] | None = None, alpha: float = 0.1) -> Metrics:
    """Six clients with 40 documents each of mostly one kind, under a rule that nobody says; a soft prompt is trained.

    `local_*` of each client's own prompt on rows like its own, `global_*` of the same prompts on all kinds; means.
    """
    torch.set_num_threads(1)
    fed, model = silos(seed, 6, 40, alpha, test=120), started(seed, make_space("soft_prompt", length=8))
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-2, "steps": 5, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), dict(knobs or {})).rounds(rounds)
    return {f"{on}_loss": float(np.mean([s["loss"] for s in run.scores(on).values()])) for on in ("local", "global")
            } | run.work()


RIGS = {"profit": profit}

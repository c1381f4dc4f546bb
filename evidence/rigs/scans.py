"""Questions about scans of five organs, each a client; the answers of one of them may be dealt out anew."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.data.load import load_federation
from fedllm.data.simulated.scans import ORGANS
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.made import Made, make_net
from fedllm.spaces import make_space

PROMPTS, WIDTH, LIAR = 4, 24, 2


@functools.lru_cache(maxsize=8)
def federation(seed: int, rows: int = 90) -> Any:
    """A third of an organ's questions are its test."""
    return load_federation({"source": "sim:scans", "task": "pairs", "simulated": {"rows": rows, "shuffled": LIAR},
                            "partition": {"kind": "by_key", "key": "organ"}, "test": 0.0, "client_test": 0.33}, seed)


def scans(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12, lr: float = 3e-3
          ) -> Metrics:
    """`honest_accuracy`: how often the four clients with true answers are right on their own test questions."""
    torch.set_num_threads(1)
    fed = federation(seed)
    model = make_net("pairs", Made(WIDTH, 1, fed.labels, prompts=PROMPTS), make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="adam", lr=lr, steps=5, batch_size=16), seed)
    trial = Trial(method, world, dict(knobs or {})).rounds(rounds)
    got = trial.scores("local")
    honest = [s for c, s in got.items() if c != ORGANS[LIAR]]
    return {"honest_accuracy": float(np.mean([s["accuracy"] for s in honest])),
            "honest_loss": float(np.mean([s["loss"] for s in honest])),
            "reported_by_liar": float(trial.state["accuracy"].get(ORGANS[LIAR], 0.0)) if "accuracy" in trial.state
            else 0.0, **trial.work()}


def scans_bytes(method: str, seed: int) -> Metrics:
    """`over_formula`: bytes of the prompt and the accuracy that a client sends, by 4 (m d + 1)."""
    torch.set_num_threads(1)
    fed = federation(seed, 20)
    model = make_net("pairs", Made(WIDTH, 1, fed.labels, prompts=PROMPTS), make_space("full"), seed=seed)
    trial = Trial(method, World(model, fed, LocalSpec(steps=1), seed), {}).rounds(1)
    numbers = [p.numel() + 1 for p in trial.state["prompts"].values()]
    return {"over_formula": max(numbers) / (PROMPTS * WIDTH + 1)}


RIGS = {"scans": scans, "scans_bytes": scans_bytes}

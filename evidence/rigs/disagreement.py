"""How far clients' models have come apart when their training of a round ends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import rel_entr, softmax

from evidence.rigs.shift import encoder_of, shifted
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.layer import Layer
from fedllm.core.payload import add, part
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.objectives.distill import teacher_logits
from fedllm.local.requests import Limits, Measure
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space


class Overheard(Layer):
    """Keeps what each client's trainables were when it sent their change."""

    def __init__(self) -> None:
        self.ended: dict[str, dict[str, torch.Tensor]] = {}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        reply = call(msg)
        if delta := part(reply, "delta"):
            self.ended[client.id] = add(part(msg, "theta"), delta)
        return reply


def disagreement(method: str, seed: int, *, shift: float = 0.5, rows: int = 120, rounds: int = 6,
                 knobs: Mapping[str, Any] | None = None, local: Mapping[str, Any] | None = None) -> Metrics:
    """`divergence`: the mean Jensen-Shannon divergence of two clients' predictions on 200 rows that are nobody's, after
    the last round's local training."""
    torch.set_num_threads(1)
    fed, model = shifted(seed, shift, rows), encoder_of(seed, make_space("adapter", size=12), 2)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    heard = Overheard()
    run = Trial(method, World(model, fed, spec, seed), dict(knobs or {}), layers=(heard,)).rounds(rounds)
    probe = shifted(seed + 50_000, 0.0, 8).test
    said = [softmax(run_measures([Measure(c, model, theta, None, probe, fn=teacher_logits)], Limits())[0], axis=1)
            for c, theta in sorted(heard.ended.items())]
    apart = [np.mean((rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(1)) / 2
             for p, q in itertools.combinations(said, 2)]
    return {"divergence": float(np.mean(apart)), **run.work()}


RIGS = {"disagreement": disagreement}

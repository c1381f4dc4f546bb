"""Rig A with any space: what of the encoder is trained, and what each client's own model is good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.rigs.spaces import topic_run
from evidence.rigs.trials import Metrics
from fedllm.spaces import make_space

LORA = {"name": "lora", "rank": 4, "alpha": 8.0, "targets": ("query", "value")}


def subspace(method: str, seed: int, *, space: Mapping[str, Any] | None = None, knobs: Mapping[str, Any] | None = None,
             rounds: int = 15, alpha: float = 0.1, local: Mapping[str, Any] | None = None) -> Metrics:
    """Topic classification, eight clients by Dirichlet(alpha) over eight labels, a pre-trained encoder.

    `global_*` on the IID test, `local_*` on rows with each client's own label mix, each client with the model that it
    would use; `up_bytes` and `down_bytes` are the largest message of a round's training.
    """
    made = dict(space or LORA)
    return topic_run(method, seed, make_space(made.pop("name"), **made), knobs, rounds,
                     {"lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})}, alpha)


RIGS = {"subspace": subspace}

"""A look that no client has: what a federation of three looks is worth on a fourth, and what it costs its clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evidence.rigs.shapes import PAIRS, Some, shapes_world
from evidence.rigs.sighted import Knobs, frozen, means, trained
from evidence.rigs.trials import Metrics
from fedllm.core.rng import numpy_stream


def apart(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None, local: Knobs = None,
          rounds: int = 10, look: str = "faded", classes: int = 16, shots: int = 4) -> Metrics:
    """Clients of photos, sketches and noisy pictures of the same 16 classes, tested on faded ones."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "whose classes")
    labels = tuple(PAIRS[i] for i in sorted(rng.permutation(len(PAIRS))[:classes]))
    shards = {f"client-{one}": (Some(labels, one, shots), None) for one in ("photo", "sketch", "noisy")}
    world = shapes_world(seed, labels, shards, [Some(labels, look, 12)], space, local)
    run, cost = trained(method, world, knobs, rounds)
    got = means(run, "global")
    return {**got, "over_zero_shot": got["accuracy"] - frozen(world)["accuracy"], **cost}


RIGS = {"shapes_apart": apart}

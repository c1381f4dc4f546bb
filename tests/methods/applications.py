"""Rows and networks of the applications, for the tests that hold for all methods."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from fedllm.models.made import Made, make_net
from fedllm.spaces import make_space
from fedllm.tasks.row import Encoded

PAST, HORIZON, VARIABLES = 5, 5, 3


def windows(rnd: random.Random, n: int) -> list[Encoded]:
    """Windows of noise."""
    noise = np.random.default_rng(rnd.randrange(2**32))
    return [Encoded(np.zeros(PAST + HORIZON, np.int32), 0, HORIZON, {
        "past": noise.normal(0, 1, (PAST, VARIABLES)).astype(np.float32), "scale": np.array([1.0, 2.0]),
        "future": noise.normal(0, 1, (HORIZON, VARIABLES)).astype(np.float32)}) for _ in range(n)]


def net_of(name: str, **by: Any) -> Any:
    """The network alone, 8 wide and one block deep."""
    return make_net(name, Made(8, 1, **by), make_space("full")).net


ROWS = {"forecast": windows}
LABELS: dict[str, tuple[str, ...]] = {}
NETS = {"forecast": lambda: net_of("series", sizes={"past": PAST, "horizon": HORIZON, "variables": VARIABLES,
                                                    "target": 0})}

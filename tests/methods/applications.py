"""Rows and networks of the applications, for the tests that hold for all methods."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from fedllm.core.rng import torch_stream
from fedllm.models.made import NETS as NETWORKS
from fedllm.models.made import Made
from fedllm.tasks.row import Encoded

PAST, HORIZON, VARIABLES = 5, 5, 3


def windows(rnd: random.Random, n: int) -> list[Encoded]:
    """Windows of noise."""
    noise = np.random.default_rng(rnd.randrange(2**32))
    return [Encoded(np.zeros(PAST + HORIZON, np.int32), 0, HORIZON, {
        "past": noise.normal(0, 1, (PAST, VARIABLES)).astype(np.float32), "scale": np.array([1.0, 2.0]),
        "future": noise.normal(0, 1, (HORIZON, VARIABLES)).astype(np.float32)}) for _ in range(n)]


ITEMS = ("one/red ink", "one/old oak", "one/green tea", "two/red oak", "two/old ink", "two/tall tea")


def histories(rnd: random.Random, n: int) -> list[Encoded]:
    """Histories of one to four items, and what came next."""
    taken = [np.array([rnd.randrange(len(ITEMS)) for _ in range(rnd.randint(1, 4))]) for _ in range(n)]
    return [Encoded(x.astype(np.int32), rnd.randrange(len(ITEMS)), 1, {"history": x}, {"history": -1.0}) for x in taken]


def pairs(rnd: random.Random, n: int) -> list[Encoded]:
    """Pictures of noise with two to five words, and one of three labels."""
    noise = np.random.default_rng(rnd.randrange(2**32))
    said = [np.array([rnd.randrange(1, 40) for _ in range(rnd.randint(2, 5))]) for _ in range(n)]
    return [Encoded(np.zeros(16 + len(words), np.int32), rnd.randrange(3), 1, {
        "pixels": noise.normal(0, 1, (3, 8, 8)).astype(np.float32), "words": words}, {"words": -1.0}) for words in said]


def kept(rows: list[Encoded], part: str) -> list[Encoded]:
    """The rows with this part alone."""
    return [replace(row, parts={part: row.parts[part]}, pads={n: v for n, v in row.pads.items() if n == part})
            for row in rows]


def net_of(name: str, **by: Any) -> Any:
    """The network alone, 8 wide and one block deep."""
    return NETWORKS[name][1](Made(8, 1, **by), torch_stream(0, name))


ROWS = {"forecast": windows, "next_item": histories, "pairs": pairs}
LABELS = {"next_item": ITEMS, "pairs": ("one", "two", "three")}
NETS = {"forecast": lambda: net_of("series", sizes={"past": PAST, "horizon": HORIZON, "variables": VARIABLES,
                                                    "target": 0}),
        "next_item": lambda: net_of("shop", labels=ITEMS, codes=(2, 4), prompts=3),
        "pairs": lambda: net_of("pairs", labels=LABELS["pairs"], prompts=2, picture=8)}

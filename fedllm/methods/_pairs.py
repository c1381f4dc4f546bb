"""Pairs of answers at a client: as tokens, and by how much a model likes the one more than the other (DPO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.client import Client
from fedllm.core.payload import Tree
from fedllm.local.objectives.dpo import log_likelihood
from fedllm.tasks.preference import chosen, rejected


def pairs(client: Client, rows: Sequence[Any]) -> tuple[Any, Any]:
    """Prompt and answer as tokens: with the chosen ones, and with the rejected."""
    read = client.encode(rows)
    return [chosen(row) for row in read], [rejected(row) for row in read]


def margins(client: Client, theta: Tree, better: Any, worse: Any) -> np.ndarray:
    """log pi(y+|x) - log pi(y-|x) of each pair."""
    said = client.measure(theta, [*better, *worse], log_likelihood)[:, 0]
    return said[: len(better)] - said[len(better) :]

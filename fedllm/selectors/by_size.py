"""By size: a client is asked the more often, the more training rows it says it has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.card import Card, Claim
from fedllm.core.select import Selector, Turn


@dataclass(frozen=True)
class BySize(Selector):
    """Draws without replacement with probability n_k / n. Weigh replies alike (`method: {weighting: uniform}`), or
    large clients count twice."""

    card = Card(
        title="Selection by size",
        paper="Li et al., On the Convergence of FedAvg on Non-IID Data, ICLR 2020, arXiv 1907.02189 (scheme I)",
        topic="selection", sends="nothing beside the number of rows that a client declares", needs="nothing",
        claim=Claim("asks clients in proportion to their rows: correlation of rows and rounds above 0.8 over 200 "
                    "rounds of 10 of 100", rig="draws", metric="with_size", holds=">", threshold=0.8, seeds=5),
    )

    def pick(self, turn: Turn) -> list[str]:
        n = np.array([max(c.n, 1) for c in turn.clients], float)
        want = min(turn.want, len(n))
        return [turn.clients[i].id for i in turn.rng.choice(len(n), want, replace=False, p=n / n.sum())]

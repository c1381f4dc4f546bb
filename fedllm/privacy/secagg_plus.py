"""Secure aggregation with few neighbors: each client shares masks with k others instead of with all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.core.method import knob
from fedllm.privacy.secagg import SecAgg


@dataclass(frozen=True)
class SecAggPlus(SecAgg):
    """SecAgg+ (Bell et al., CCS 2020): a k-regular graph, so keys, shares and masks grow with log n and not with n.

    The graph is drawn from all advertised keys: the server of a round is trusted not to steer it (honest but curious),
    and a client's secrets open when more than the threshold's share of its own neighborhood says so.
    """

    threshold: float = knob(0.5, "a secret opens for more than this share of its holders (a client's neighborhood)",
                            ge=0.5, lt=1)
    degree: int | None = knob(None, "k, neighbors of each client; None: 6 log2(n), or all when that is more", ge=2)

    def neighbors(self, clients: Sequence[str], seed: bytes) -> dict[str, list[str]]:
        n = len(clients)
        k = min(n - 1, self.degree or 2 * math.ceil(3 * math.log2(n)))
        k -= k % 2 if n > k + 1 else 0
        if k >= n - 1:
            return super().neighbors(clients, seed)
        ring = list(clients)
        random.Random(seed).shuffle(ring)  # public on purpose: both sides of an edge must know it
        # Harary's graph on a random ring: k/2 neighbors on either side
        steps = [d for h in range(1, k // 2 + 1) for d in (h, -h)]
        return {c: sorted(ring[(i + d) % n] for d in steps) for i, c in enumerate(ring)}

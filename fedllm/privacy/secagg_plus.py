"""Secure aggregation with few neighbors: each client shares masks with k others instead of with all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.knobs import knob
from fedllm.core.layer import Facts
from fedllm.privacy.secagg import SecAgg


@dataclass(frozen=True)
class SecAggPlus(SecAgg):
    """SecAgg+ (Bell et al., CCS 2020): a k-regular graph, so keys, shares and masks grow with log n and not with n.

    The graph is drawn from all advertised keys: the server of a round is trusted not to steer it (honest but curious),
    and a client's secrets open when more than the threshold's share of its own neighborhood says so. How likely it is
    that a graph gives some neighborhood to colluders is bounded and stated (`bits`); no bound, no run.
    """

    threshold: float = knob(0.5, "a secret opens for more than this share of its holders (a client's neighborhood)",
                            ge=0.5, lt=1)
    degree: int | None = knob(None, "k, neighbors of each client; None: 6 log2(n), or all when that is more", ge=2)

    corrupt: float = knob(0.2, "share of the clients that may collude with the server: what the level is stated for",
                          ge=0, lt=1)
    cohort: int = knob(0, "clients of a round; found out by the run", ge=0)

    def bind(self, facts: Facts) -> SecAggPlus:
        n = min(facts.cohort or len(facts.rows), len(facts.rows))
        super().bind(facts)
        if not self.bits(n) > 0:
            raise CompositionError(
                f"SecAggPlus.degree = {self._degree(n)} among {n} clients promises nothing where a share of "
                f"{self.corrupt} colludes: the bound on their owning a neighborhood is 1 or more; raise degree or "
                "threshold, declare fewer colluders (corrupt), or use secagg")
        return replace(self, cohort=n)

    def bits(self, n: int) -> float:
        """-log2 of a bound on the chance that colluders hold enough shares of some client's secrets.

        Union over n clients of P[X >= t], X hypergeometric: k neighbors of n - 1 others, of whom `corrupt` n collude.
        """
        k, bad = self._degree(n), min(n - 1, math.floor(self.corrupt * n))
        t = self.needed(k + 1)  # the client holds a share of its own secrets too
        ways = sum(math.comb(bad, x) * math.comb(n - 1 - bad, k - x) for x in range(t, min(k, bad) + 1))
        return math.log2(math.comb(n - 1, k)) - math.log2(n * ways) if ways else math.inf

    def statement(self, state: Any) -> dict[str, Any]:
        level = {"security_bits": round(self.bits(self.cohort), 1), "corrupt": self.corrupt} if self.cohort else {}
        return {**super().statement(state), **level}

    def _degree(self, n: int) -> int:
        k = min(n - 1, self.degree or 2 * math.ceil(3 * math.log2(n)))
        return k - (k % 2 if n > k + 1 else 0)

    def neighbors(self, clients: Sequence[str], seed: bytes) -> dict[str, list[str]]:
        n, k = len(clients), self._degree(len(clients))
        if k >= n - 1:
            return super().neighbors(clients, seed)
        ring = list(clients)
        random.Random(seed).shuffle(ring)  # public on purpose: both sides of an edge must know it
        # Harary's graph on a random ring: k/2 neighbors on either side
        steps = [d for h in range(1, k // 2 + 1) for d in (h, -h)]
        return {c: sorted(ring[(i + d) % n] for d in steps) for i, c in enumerate(ring)}

"""Robust learning rate: where too few clients agree on a sign the step is reversed (Ozdayi et al., AAAI 2021)."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.core.layer import Facts
from fedllm.defenses._robust import Robust, Rows, Verdict, asked


@dataclass(frozen=True)
class RLR(Robust):
    """Ozdayi, Kantarcioglu, Gel, Defending against Backdoors in FL with Robust Learning Rate, arXiv 2007.03767."""

    theta: float | None = knob(None, "signs that must agree, as |sum of signs|; 0: the mean; None: 2f + 1 with f a "
                                     "fifth of those asked, and one at least", ge=0)

    def bind(self, facts: Facts) -> Robust:
        return replace(self.enough(facts), theta=self.agreeing(asked(facts)))  # type: ignore[type-var]

    def agreeing(self, n: int) -> float:
        """theta, for n clients."""
        return 2 * max(1, n // 5) + 1 if self.theta is None else self.theta

    def short(self, n: int) -> tuple[str, str] | None:
        """With fewer than theta every step would be reversed; one reply always agrees with itself."""
        theta = self.agreeing(n)
        least = max(2, math.ceil(theta)) if theta else 1
        return self.below(n, least, f"theta = {theta:g}", f"theta <= n = {n}" if n > 1 else "theta = 0, the mean")

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        return Verdict(robust_rate(rows.x, self.agreeing(len(rows.x))))


def robust_rate(x: Tensor, theta: float) -> Tensor:
    """[K, d] -> [d]: the mean, with its sign turned where |sum_k sign(u_kj)| < theta."""
    agree = x.sign().sum(0).abs() >= theta
    return x.mean(0) * (2 * agree.to(x.dtype) - 1)

"""Robust learning rate: where too few clients agree on a sign the step is reversed (Ozdayi et al., AAAI 2021)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.layer import Facts
from fedllm.defenses._robust import Robust, Rows, Verdict


@dataclass(frozen=True)
class RLR(Robust):
    """Ozdayi, Kantarcioglu, Gel, Defending against Backdoors in FL with Robust Learning Rate, arXiv 2007.03767."""

    theta: float | None = knob(None, "signs that must agree, as |sum of signs|; 0: the mean; None: 2f + 1 with f a "
                                     "fifth of those asked", ge=0)

    def bind(self, facts: Facts) -> Robust:
        n = min(facts.cohort or len(facts.rows), len(facts.rows))
        theta = 2 * (n // 5) + 1 if self.theta is None else self.theta
        if theta > n:
            raise RecipeError(f"RLR.theta = {theta:g} is not allowed with n = {n} clients a round; it must be <= n")
        return replace(self, theta=theta)

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        n = len(rows.x)
        return Verdict(robust_rate(rows.x, 2 * (n // 5) + 1 if self.theta is None else self.theta))


def robust_rate(x: Tensor, theta: float) -> Tensor:
    """[K, d] -> [d]: the mean, with its sign turned where |sum_k sign(u_kj)| < theta."""
    agree = x.sign().sum(0).abs() >= theta
    return x.mean(0) * (2 * agree.to(x.dtype) - 1)

"""RFA: the smoothed geometric median, by Weiszfeld's weighted means (Pillutla et al., IEEE TSP 2022)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.defenses._robust import Robust, Rows, Verdict


@dataclass(frozen=True)
class RFA(Robust):
    """Pillutla, Kakade, Harchaoui, Robust Aggregation for Federated Learning, arXiv 1912.13445.

    argmin_v sum_k ||v - u_k|| over the whole vector, all clients alike. Breaks at half of the clients.
    """

    nu: float = knob(1e-6, "smoothing: distances count as at least this", gt=0, le=1e-2)
    iterations: int = knob(50, "most steps of Weiszfeld's algorithm", ge=1)
    tol: float = knob(1e-6, "stop when the sum of distances falls by less than this share", ge=0)

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        v, weights, _ = geometric_median(rows.x, self.nu, self.iterations, self.tol)
        return Verdict(v, weights)


def geometric_median(x: Tensor, nu: float, iterations: int, tol: float) -> tuple[Tensor, Tensor, list[float]]:
    """[K, d] -> the median [d], each row's weight in it [K], and the sum of distances after every step."""
    y = x.double()
    v, sums = y.mean(0), []
    weights = y.new_full((len(y),), 1 / len(y))
    for _ in range(iterations):
        far = (y - v).norm(dim=1)
        sums.append(float(far.sum()))
        if len(sums) > 1 and sums[-2] - sums[-1] <= tol * sums[-2]:
            break
        beta = 1 / far.clamp(min=nu)  # beta_k = a_k / max(nu, ||v - u_k||)
        weights = beta / beta.sum()
        v = weights @ y
    return v.to(x.dtype), weights, sums

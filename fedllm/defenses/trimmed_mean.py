"""The coordinate-wise trimmed mean: the largest and smallest values of every entry are left out (Yin et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.defenses._robust import Robust, Rows, Verdict


@dataclass(frozen=True)
class TrimmedMean(Robust):
    """Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498.

    Equals flwr's FedTrimmedAvg (which cuts floor(beta n) as well).
    """

    trim: float = knob(0.2, "beta: this share is cut at either end, rounded down to whole clients; 0: the mean", ge=0,
                       lt=0.5)

    def short(self, n: int) -> tuple[str, str] | None:
        least = math.ceil((1 - 1e-9) / self.trim) if self.trim else 1  # whom it cuts are whole clients
        return self.below(n, least, f"trim = {self.trim:g}", "trim = 0, the mean")

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        return Verdict(trimmed_mean(rows.x, int(self.trim * len(rows.x) + 1e-9)))


def trimmed_mean(x: Tensor, cut: int) -> Tensor:
    """[K, d] -> [d]: without the `cut` smallest and the `cut` largest of every column."""
    if cut == 0:
        return x.mean(0)
    return x.sort(0).values[cut : len(x) - cut].mean(0)

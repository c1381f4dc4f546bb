"""Empirical epsilon: what the privacy of a run can at best have been, given how well an attack on it did."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

from fedllm.audits.membership import bounds

CONFIDENCE = 0.95
MOST = 50.0
"""Larger ones are all the same."""


def one_run(scores: np.ndarray, inside: np.ndarray, delta: float = 0.0, guesses: int | None = None) -> dict[str, float]:
    """Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846): m rows that were each trained on by a coin flip.

    The attacker calls the highest scores in and the lowest out, half of `guesses` (None: m / 2) each. Under
    (eps, delta)-DP the number of right guesses is hardly above Binomial(guesses, e^eps / (1 + e^eps)); `epsilon` is
    the largest one that it refutes at 95 %.
    """
    m = len(scores)
    r = 2 * ((guesses or m // 2) // 2)
    order = np.argsort(scores, kind="stable")
    right = int((~inside[order[: r // 2]]).sum() + inside[order[m - r // 2 :]].sum()) if r else 0
    refuted = lambda eps: p_value(m, r, right, eps, delta) - (1 - CONFIDENCE)  # noqa: E731
    low = 0.0
    if r and refuted(0.0) <= 0:
        low = float(brentq(refuted, 0.0, MOST)) if refuted(MOST) > 0 else MOST
    return {"epsilon": low, "canaries": m, "guesses": r, "right": right}


def p_value(m: int, guesses: int, right: int, eps: float, delta: float) -> float:
    """Largest probability of so many right guesses under (eps, delta)-DP (their theorem 5.2)."""
    q = 1 / (1 + math.exp(-eps))
    tail = float(binom.sf(right - 1, guesses, q))
    if not delta or not right:
        return tail
    i = np.arange(1, right + 1)
    worst = float((binom.pmf(right - i, guesses, q).cumsum() / i).max())
    return min(1.0, tail + 2 * m * delta * worst)


def from_rates(true_positives: int, members: int, false_positives: int, others: int, delta: float = 0.0) -> float:
    """Kairouz, Oh and Viswanath 2015: ln of (TPR - delta) / FPR and of (1 - FPR - delta) / (1 - TPR), at 95 % bounds.

    Of many runs, or of one row each; within one run rows are not independent, and `one_run` is the sound one.
    """
    tpr_low, fpr_high = bounds(true_positives, members)[0], bounds(false_positives, others)[1]
    ratios = [((tpr_low - delta), fpr_high), ((1 - fpr_high - delta), 1 - tpr_low)]
    return max([0.0, *(math.log(a / b) for a, b in ratios if a > 0 and b > 0)])

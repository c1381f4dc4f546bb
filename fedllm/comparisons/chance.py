"""How sure a mean over seeds is: bootstrap intervals, sign-flip permutation tests, and what many tests at once take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

LEVEL, LEAST = 0.95, 6
"""Of the interval; and the seeds below which no sign-flip test can come out below 1 - LEVEL."""
TINY = 1e-300
DRAWS = 9999
"""Resamples of the bootstrap, and of the sign flips where there are more than can be counted out."""


def interval_and_p(margins: np.ndarray) -> tuple[float, float, float]:
    """Bootstrap interval (BCa) of the mean, and the two-sided p of a sign-flip permutation test against 0."""
    from scipy import stats

    low, high = interval(margins)
    if len(margins) < 2:
        return low, high, 1.0
    flips = stats.permutation_test((margins,), np.mean, permutation_type="samples", n_resamples=DRAWS,
                                   rng=np.random.default_rng(0))
    return low, high, float(flips.pvalue)


def interval(figures: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval (BCa, at LEVEL) of the mean; of one figure, or of equal ones, that figure itself."""
    from scipy import stats

    low = high = float(figures.mean())
    if len(figures) < 2 or np.ptp(figures) < 1e-12 * max(TINY, float(np.abs(figures).max())):
        return low, high
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where BCa cannot be had it says so, and the percentiles are taken
        for method in ("BCa", "percentile"):
            got = stats.bootstrap((figures,), np.mean, confidence_level=LEVEL, n_resamples=DRAWS, method=method,
                                  rng=np.random.default_rng(0)).confidence_interval
            low, high = float(got.low), float(got.high)
            if math.isfinite(low) and math.isfinite(high):
                break
    return low, high


def held_together(ps: Sequence[float]) -> list[float]:
    """Each p of several tests as Holm corrects it: the chance that any of them misleads stays below the level."""
    out, worst = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))  # a later test is never surer than an earlier one
        out[i] = worst
    return out


def seeds_needed(tests: int) -> int:
    """The fewest seeds with which one of so many sign-flip tests can come out below 1 - LEVEL: the least p is
    2 / 2^seeds."""
    return math.ceil(1 + math.log2(max(1, tests) / (1 - LEVEL)) - 1e-9)

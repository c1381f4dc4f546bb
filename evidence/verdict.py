"""What may be said of a claim's figures: the rules are here, not on the card.

Three sets of seeds have nothing in common: those that authors looked at while building (below 2000, with those of the
audit of 2026-11-29), those that rates are tuned on (2000 to 3999), and those that are measured (4000 and on).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.comparisons.chance import LEAST, LEVEL, TINY, interval_and_p
from fedllm.core.card import Claim
from fedllm.core.errors import RecipeError

HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
RELATIVE: Mapping[str, Callable[[float, float], float]] = {
    "own": lambda mine, _: mine, "ratio": lambda mine, other: mine / other if other else math.nan,
    "difference": lambda mine, other: mine - other}
TUNED = range(2000, 4000)


def measured_on(claim: Claim) -> list[int]:
    """The seeds of the figures that are judged: none that was looked at while building, none that tuned a rate."""
    count = claim.seeds or 3 if claim.sort == "exact" else max(10, claim.seeds or 0)
    return list(range(claim.unseen, claim.unseen + count))


def tuned_on(claim: Claim, seeds: int = 2) -> list[int]:
    """The seeds on which each arm's rates are chosen."""
    return list(TUNED[:seeds]) if claim.grid else []


@dataclass(frozen=True)
class Judgment:
    """The mean figure, between which bounds it lies with 95 %, how likely so much is by chance, and the verdict."""

    verdict: Literal["holds", "fails", "open"]
    figure: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def judge(claim: Claim, figures: Sequence[float]) -> Judgment:
    """holds or fails: the 95 % interval is on one side of the bar, and so is the sign-flip test at 5 %. open: it covers
    the bar, or there are too few seeds to tell. An exact claim holds for every seed or fails.

    A ratio is judged, and its mean taken, on the scale of its logarithm: half and double are equally far from 1.
    """
    each, ok = np.array(figures, float), HOLDS[claim.holds]
    if not np.isfinite(each).all():
        return Judgment("fails", float("nan"))
    if claim.sort == "exact":
        return Judgment("holds" if all(ok(x, claim.threshold) for x in figures) else "fails", float(each.mean()))
    logs = claim.relative == "ratio" and bool((each >= 0).all()) and claim.threshold > 0
    scale = (lambda x: np.log(np.maximum(x, TINY))) if logs else np.asarray  # type: ignore[assignment]
    margins = scale(each) - scale(np.array(claim.threshold))
    low, high, p = interval_and_p(margins)
    back = (lambda x: float(claim.threshold * np.exp(x))) if logs else (lambda x: float(x + claim.threshold))
    told = (back(margins.mean()), back(low), back(high), p)
    if len(each) < LEAST:
        return Judgment("open", *told)
    if low == high == 0:  # on the bar, every time
        return Judgment("holds" if ok(0.0, 0.0) else "fails", *told)
    good, bad = (high < 0, low > 0) if claim.holds in ("<", "<=") else (low > 0, high < 0)
    sure = p <= 1 - LEVEL
    return Judgment("holds" if good and sure else "fails" if bad and sure else "open", *told)


def same_work(name: str, claim: Claim, mine: Mapping[str, float], other: Mapping[str, float]) -> str:
    """`equal`, or what is known of the arms' work; refused when the rig reports unequal work and no card says why.

    A rig reports work under keys `work_...` (rounds, local steps, rows a step).
    """
    told = {k for k in {*mine, *other} if k.startswith("work_")}
    if apart := sorted(k for k in told if mine.get(k) != other.get(k)):
        if not claim.unequal:
            said = ", ".join(f"{k} = {mine.get(k)} against {other.get(k)}" for k in apart)
            raise RecipeError(f"claim {name!r}: its arms did unequal work ({said}); make it equal, or say why it may "
                              "not be in Claim.unequal")
        return claim.unequal
    return claim.unequal or ("equal" if told else "not reported")


def fingerprint(claim: Claim) -> dict[str, Any]:
    """All of a claim that its verdict depends on: a row whose claim has changed is no row of it any more."""
    return {"rig": claim.rig, "metric": claim.metric, "baseline": claim.baseline, "relative": claim.relative,
            "holds": claim.holds, "threshold": claim.threshold, "kind": claim.sort, "unseen": claim.unseen,
            "grid": {k: list(v) for k, v in claim.grid.items()}, "options": repr(sorted(claim.options.items())),
            "against": repr(sorted(claim.against.items()))}

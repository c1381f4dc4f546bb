"""How much two texts copy each other: ROUGE-L, and the largest of it against many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def rouge_l(one: str, other: str, least: float = 0.0) -> float:
    """F1 of the longest common subsequence of words; below `least` a bound may stand in for it, to save time."""
    a, b = one.lower().split(), other.lower().split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    bound = 2 * common / (len(a) + len(b))  # no subsequence has more words than both share
    return bound if bound < least else 2 * _longest(a, b) / (len(a) + len(b))


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def closest(text: str, others: Iterable[str], least: float = 0.0) -> float:
    """The largest ROUGE-L of a text to any of the others; 0 without others."""
    return max((rouge_l(text, other, least) for other in others), default=0.0)

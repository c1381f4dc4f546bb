"""How much of a text an attacker recovered, beside what a guess from public text would have given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

Tokens = Sequence[int]


@dataclass(frozen=True)
class Recovered:
    """Shares in [0, 1]: tokens as bags over all rows, and ROUGE-L (F1) of the rows paired as best they go."""

    precision: float
    recall: float
    rouge_l: float
    found: int
    """Tokens that the attacker named."""
    real: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def compare(found: Sequence[Tokens], real: Sequence[Tokens]) -> Recovered:
    """The rows that an attacker wrote down against the rows that there were, in any order of rows."""
    mine, theirs = Counter(t for r in found for t in r), Counter(t for r in real for t in r)
    hits = sum((mine & theirs).values())
    scores = np.array([[rouge_l(f, r) for r in real] for f in found]).reshape(len(found), len(real))
    rows, columns = linear_sum_assignment(-scores)
    return Recovered(hits / max(1, sum(mine.values())), hits / max(1, sum(theirs.values())),
                     float(scores[rows, columns].sum() / max(1, len(real))), sum(mine.values()), sum(theirs.values()))


def rouge_l(a: Tokens, b: Tokens) -> float:
    """F1 of the longest common subsequence."""
    if not len(a) or not len(b):
        return 0.0
    best = np.zeros(len(b) + 1, np.int64)
    for x in a:
        match = np.where(np.asarray(b) == x, best[:-1] + 1, 0)
        best[1:] = np.maximum.accumulate(np.maximum(match, best[1:]))
    return 2.0 * float(best[-1]) / (len(a) + len(b))


def guess(public: Sequence[Tokens], lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths by somebody who saw public text alone: its commonest tokens, where they usually stand.

    The j-th copy of a token counts by the share of public rows that hold it j times or more, which makes this the bag
    of that size with the largest expected recall.
    """
    shares: Counter[tuple[int, int]] = Counter()
    places: dict[int, list[float]] = {}
    for row in public:
        seen: Counter[int] = Counter()
        for place, token in enumerate(row):
            seen[int(token)] += 1
            shares[int(token), seen[int(token)]] += 1
            places.setdefault(int(token), []).append(place / max(1, len(row)))
    ranked = [token for (token, _), _ in sorted(shares.items(), key=lambda kv: (-kv[1], kv[0]))]
    middle = {t: float(np.mean(p)) for t, p in places.items()}
    return [sorted(ranked[:n], key=lambda t: (middle[t], t)) for n in lengths]

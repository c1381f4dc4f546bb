"""Judges of two answers: how a pair is shown to one, and which clients share one (FedBis, FedBiscuit)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.client import Client
from fedllm.core.errors import RecipeError
from fedllm.tasks.preference import chosen

SHOWN = "{prompt} 1: {first} 2: {second} better:"


def shown(client: Client, rows: Sequence[Any], choices: Sequence[str]) -> tuple[list[Any], list[int]]:
    """Each pair both ways round, tokenized with the word that is right, and which word that is: 2 for each row."""
    asked, right = [], []
    for row in rows:
        for at in (0, 1):
            pair = (row["chosen"], row["rejected"]) if at == 0 else (row["rejected"], row["chosen"])
            text = SHOWN.format(prompt=row["prompt"], first=pair[0], second=pair[1])
            asked.append({"prompt": text, "chosen": choices[at], "rejected": choices[1 - at]})
            right.append(at)
    return [chosen(row) for row in client.encode(asked)], right


def words_of(client: Client, choices: Sequence[str]) -> tuple[int, int]:
    """The tokens of both choices, as they stand behind a prompt."""
    rows = client.encode([{"prompt": "better:", "chosen": choices[i], "rejected": choices[1 - i]} for i in (0, 1)])
    a, b = (next(int(t) for t in row.labels if t >= 0) for row in rows)
    if a == b:
        raise RecipeError(f"method.choices = {list(choices)} is not allowed; both begin with one token here")
    return a, b


def grouped(losses: Mapping[str, Sequence[float]], groups: int) -> dict[str, int]:
    """Each client to a judge: the judge that most like best first, at most ceil(clients left / judges left) of those
    that like it most; the others look among the judges that are left."""
    left, open_, of = sorted(losses), list(range(groups)), dict[str, int]()
    while open_:
        best = {c: min(open_, key=lambda g: (losses[c][g], g)) for c in left}
        g = max(open_, key=lambda g: (sum(b == g for b in best.values()), -g))
        fans = sorted((c for c in left if best[c] == g), key=lambda c: (losses[c][g], c))
        taken = fans[: math.ceil(len(left) / len(open_))]
        of |= dict.fromkeys(taken, g)
        left, open_ = [c for c in left if c not in taken], [o for o in open_ if o != g]
    return of

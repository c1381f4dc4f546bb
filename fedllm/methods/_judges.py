"""Judges of two answers: how a pair is shown to one, how several vote, and which clients share one (FedBiscuit)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.client import Client
from fedllm.core.errors import RecipeError, Withheld
from fedllm.core.payload import Tree
from fedllm.local.objectives.verbalized import Said
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


def liked(client: Client, theta: Tree, rows: Sequence[Any], choices: Sequence[str]) -> np.ndarray:
    """By how much a judge likes the chosen answer of each pair more than the rejected, over both ways round [rows]."""
    asked, right = shown(client, rows, choices)
    z = client.measure(theta, asked, Said(words_of(client, choices))).astype(np.float64)
    return ((z[:, 0] - z[:, 1]) * np.where(right, -1, 1)).reshape(-1, 2).sum(1)


def vote(client: Client, judges: Sequence[str], rows: Sequence[Any], choices: Sequence[str]) -> np.ndarray:
    """What most of these models of the recipe say of each pair [rows]: above 0 for the chosen answer, below for the
    rejected. Where they are even, what they say together counts."""
    each = np.stack([liked(held := client.holding(name), held.model.initial(), rows, choices) for name in judges])
    most = np.sign(each).sum(0)
    return np.where(most != 0, most, each.sum(0))


def turned(row: Any) -> dict[str, Any]:
    """The pair preferred the other way round."""
    out = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    talks = row.get("talks")
    return {**out, "talks": {"chosen": talks["rejected"], "rejected": talks["chosen"]}} if talks else out


def sampled(client: Client, theta: Tree, temperature: float) -> list[dict[str, str]]:
    """Two answers of this model to each of the client's prompts; prompts whose two are alike, or empty, are left out.

    Withheld where none is left, and for prompts that are conversations, which a plain continuation would misread.
    """
    if any("talks" in row for row in client.data):
        raise Withheld(f"client '{client.id}' samples no answers: its prompts are conversations; use answers: rows")
    asked = [row["prompt"] for row in client.data]
    said = [text.strip() for text in client.generate([*asked, *asked], theta, temperature=temperature)]
    made = [{"prompt": p, "chosen": a, "rejected": b}
            for p, a, b in zip(asked, said[: len(asked)], said[len(asked) :], strict=True) if a and b and a != b]
    if not made:
        raise Withheld(f"client '{client.id}' has no pair to judge: the model gives no two different answers to any of "
                       f"its {len(asked)} prompts at temperature {temperature:g}")
    return made


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

"""What black-box methods share: clients that hold a sealed model, and the ledger of what was asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedllm.core.ask import Replies
from fedllm.core.errors import BudgetSpent
from fedllm.core.method import Star, State, knob
from fedllm.data.encode import IGNORE, Encoded
from fedllm.models.sealed import sealed

SPENT = ("calls", "read", "said")


@dataclass(frozen=True)
class BlackBox(Star):
    """One call is one row scored, or one prompt continued. Tokens are those read and those said."""

    budget: int | None = knob(None, "most calls of the whole run; a round that would exceed it does not begin. "
                                    "None: no limit", ge=1)
    price: float = knob(0.0, "of a million tokens, in whatever money", ge=0)

    def at_client(self, model: Any) -> Any:
        return sealed(model)

    def calls(self, rows: int) -> int:
        """The most calls of one round of a client with so many rows."""
        raise NotImplementedError

    def afford(self, state: State, clients: Sequence[Any]) -> None:
        """Raise BudgetSpent when this round could ask more than is left."""
        need, spent = sum(self.calls(c.n) for c in clients), int(state["queries"]["calls"])
        if self.budget is not None and spent + need > self.budget:
            raise BudgetSpent(f"one more round may take {need} calls of the model; {spent} of the budget of "
                              f"{self.budget} are spent")

    def booked(self, state: State, out: Replies) -> dict[str, int]:
        """The ledger after these replies: a client whose answer did not count has paid all the same, at its place."""
        return {k: int(state["queries"][k]) + sum(int(note[k]) for note in out.notes.values()) for k in SPENT}

    def report(self, state: State) -> Mapping[str, Any]:
        spent = state["queries"]
        return {"queries": {**spent, "cost": (spent["read"] + spent["said"]) * self.price / 1e6, "budget": self.budget}}


def empty_ledger() -> dict[str, int]:
    """Nothing asked yet."""
    return dict.fromkeys(SPENT, 0)


class Meter:
    """Scores rows for a client and counts; the counts leave it as notes beside the reply."""

    def __init__(self, client: Any) -> None:
        self.client, self.calls, self.read, self.said = client, 0, 0, 0

    def losses(self, thetas: Sequence[Any], rows: Sequence[Any]) -> list[float]:
        """Mean loss of the rows under each of these trainables."""
        self.calls += len(thetas) * len(rows)
        self.read += len(thetas) * sum(len(r.ids) for r in rows)
        return [got.mean for got in self.client.probe(thetas, on=rows)]

    @property
    def notes(self) -> dict[str, int]:
        """`note/calls`, `note/read`, `note/said`."""
        return {f"note/{k}": v for k, v in zip(SPENT, (self.calls, self.read, self.said), strict=True)}


def noisy(rows: Sequence[Encoded], rate: float, client: Any) -> list[Encoded]:
    """The rows with this share of their words replaced by random ones; special tokens and what is learned stay."""
    rng, tokenizer = client.rng("noisy"), client.model.tokenizer
    keep = sorted(tokenizer.all_special_ids) if tokenizer is not None else []
    size = len(tokenizer) if tokenizer is not None else 1 + max(int(row.ids.max()) for row in rows)
    words = np.setdiff1d(np.arange(size, dtype=np.int32), keep)
    out = []
    for row in rows:
        learned = row.labels != IGNORE if isinstance(row.labels, np.ndarray) else np.zeros(len(row.ids), bool)
        hit = (rng.random(len(row.ids)) < rate) & ~learned & ~np.isin(row.ids, keep)
        out.append(replace(row, ids=np.where(hit, rng.choice(words, len(row.ids)), row.ids)))
    return out

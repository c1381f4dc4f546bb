"""What an audit of a run is about, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.audits import membership
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Row
from fedllm.runs.build import Parts
from fedllm.runs.folder import RunFolder
from fedllm.runs.result import Result


@dataclass(frozen=True)
class Check:
    """One figure and its limit."""

    name: str
    figure: float
    limit: float
    says: str

    @property
    def holds(self) -> bool:
        return self.figure <= self.limit


@dataclass(frozen=True)
class Audited:
    """What an audit found."""

    folder: Path
    checks: Sequence[Check]
    details: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Parts that this run cannot be audited for, and why."""

    @property
    def passes(self) -> bool:
        return all(check.holds for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values: `pass`, `checks`, `left_out` and every part's details."""
        return {"pass": self.passes, "checks": [asdict(c) | {"holds": c.holds} for c in self.checks],
                "left_out": dict(self.left_out), **self.details}


@dataclass
class Case:
    """A finished run, made again: its parts, and the model that it ended with."""

    folder: RunFolder
    result: Result
    parts: Parts
    theta: Tree
    base: Tree | None
    rows: int
    shadows: int
    transcript: bool

    @property
    def recipe(self) -> Any:
        return self.parts.recipe

    def encoded(self, rows: Sequence[Row]) -> list[Encoded]:
        return self.parts.world.tokenized(rows)

    def scores(self, rows: Sequence[Row], theta: Tree | None = None, base: Tree | None = None) -> dict[str, np.ndarray]:
        """Of the final model, or of these trainables."""
        if theta is None:
            theta, base = self.theta, self.base
        world = self.parts.world
        return membership.row_scores(world.model, theta, base, self.encoded(rows), world.limits)

    def some(self, rows: Sequence[Row], what: str) -> list[Row]:
        """At most `rows` of them, drawn from the recipe's seed."""
        if len(rows) <= self.rows:
            return list(rows)
        picks = numpy_stream(self.recipe.seed, "audit", what).choice(len(rows), self.rows, replace=False)
        return [rows[i] for i in sorted(picks)]

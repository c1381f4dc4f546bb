"""What came of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.comparisons.figures import Table


@dataclass(frozen=True)
class Comparison:
    """A finished comparison, and where it lies."""

    folder: Path
    name: str
    card: Mapping[str, Any]
    """Of a family: title, paper, shows, about."""
    seeds: Sequence[int]
    grid: Mapping[str, Sequence[Any]]
    tuned_on: Sequence[int]
    tried: Mapping[str, Mapping[str, float | None]]
    """Arm -> point of the grid -> the loss by which it was chosen; None where a run failed."""
    tables: Sequence[Table]
    cautions: Sequence[str]
    versions: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """What `comparison.json` holds."""
        return {**{k: v for k, v in vars(self).items() if k not in ("folder", "tables")},
                "tables": [t.as_json() for t in self.tables]}

    @property
    def failed(self) -> list[str]:
        """The cells that have no figure, each with the reason."""
        return [f"{row.cells[seed]}: {why}" for t in self.tables for row in t.rows for seed, why in row.failed.items()]

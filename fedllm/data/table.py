"""The rows of one file or dataset, before they are anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """The rows of one file or dataset, and how an error should speak of them."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    lines: Sequence[int] = ()
    """JSONL, CSV, TSV and text: the line on which each row begins, from 1, since blank lines are skipped."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names by column, where a `datasets` dataset declares them."""
    path: Path | None = None
    folder: Path | None = None
    """Where relative paths in rows begin; None: where the program runs."""

    def where(self, i: int) -> str:
        """Row `i` (from 0) as an error names it: `notes.jsonl, row 3 (line 5)`."""
        return f"{self.name}, row {i + 1}" + (f" (line {self.lines[i]})" if self.lines else "")

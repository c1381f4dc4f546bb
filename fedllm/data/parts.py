"""What partitions share: checks of their knobs, and rows by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.federation import Row
from fedllm.tasks.row import as_text, nearest, value_of

NOBODY = "\0null"
"""Groups rows whose key is null: a client of their own, and not those whose key reads null."""
Parts = dict[str, list[int]]
"""Each client's row indices, in order."""
SKEW = (1e-6, 1e6)
"""Dirichlet concentrations that can be drawn from: beyond them shares are NaN, and all rows were one client's."""


def checked_number(key: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Refuses a knob out of range, naming the key, the value and what is allowed."""
    kind = int if whole else int | float
    right = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not low <= value <= high:
        bound = f"from {low:g} up" if high == math.inf else f"from {low:g} to {high:g}"
        raise RecipeError(f"data.partition.{key} = {value!r}: allowed is a {'whole ' if whole else ''}number {bound}")


def checked_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        names = ", ".join(allowed)
        raise RecipeError(f"data.partition.{key} = {value!r}: allowed is one of {names}{nearest(value, allowed)}")


def numbered(parts: Sequence[Sequence[int] | np.ndarray]) -> Parts:
    """The parts as client-00, client-01, ...; a DataError names one that is empty."""
    width = max(2, len(str(len(parts) - 1)))
    named = {f"client-{i:0{width}d}": sorted(int(row) for row in part) for i, part in enumerate(parts)}
    for name, part in named.items():
        if not part:
            raise DataError(f"{name} would have no rows ({sum(map(len, parts))} rows for {len(parts)} clients): "
                            "ask for fewer clients or for less skew")
    return named


def enough(rows: Sequence[Row], clients: int, least: int = 1) -> None:
    """Refuses a split that cannot give each client its least number of rows, naming the first that would go short."""
    if len(rows) < clients * least:
        short = len(rows) // least
        raise DataError(f"client-{short:02d} would have too few rows: {clients} clients with {least} or more each "
                        f"need {clients * least} rows, and there are {len(rows)}")


def groups_of(rows: Sequence[Row], by: str | None) -> dict[str, list[int]]:
    """Row indices by the value of a column (default: `label` where there is one, else `category`)."""
    by = by or ("label" if rows and "label" in rows[0] else "category")
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        where = f"data.partition by {by!r}: row {i + 1}"
        value = value_of(row, by, where)
        groups.setdefault(NOBODY if value is None else as_text(value, by, where), []).append(i)
    return dict(sorted(groups.items()))


def sizes(total: int, weights: np.ndarray, least: int) -> np.ndarray:
    """Whole sizes that sum to `total`, nearly proportional to `weights` [clients], none below `least`."""
    share = weights / weights.sum() * (total - least * len(weights))
    whole = np.floor(share).astype(np.int64)
    # Largest remainder: the rows lost to rounding go where rounding took most.
    whole[np.argsort(whole - share, kind="stable")[: total - least * len(weights) - whole.sum()]] += 1
    return whole + least

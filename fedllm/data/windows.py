"""Cuts series of readings into windows: what was seen, and what came after; tests lie after all that is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from fedllm.core.errors import DataError
from fedllm.data.spec import Spec
from fedllm.data.table import Table
from fedllm.data.times import Clock
from fedllm.tasks.row import as_text, value_of

SERIES, START = "series", "start"
"""Columns of a window: the name of its series, and its first step there."""
SPREAD = 1e-6
"""A variable whose readings spread less is constant, and is only shifted."""


class WindowSpec(Spec):
    """How tables of readings, a row a reading, become windows; steps are in the order of `time`."""

    of: Annotated[list[str], Field(min_length=1)]
    """The columns that are variables, each standardized by what its own series holds before any test."""
    target: str | None = None
    """The variable that is forecast; None: the first of `of`."""
    time: str | Annotated[list[str], Field(min_length=1)]
    """The column, or the columns from the coarse to the fine, that order readings; those of one time are averaged, so
    that [year, month, day] makes daily steps of hourly readings."""
    series: str | None = None
    """The column that names the series (a station); None: all is one."""
    past: Annotated[int, Field(ge=2, le=10_000)] = 12
    """Steps that a window shows."""
    horizon: Annotated[int, Field(ge=1, le=10_000)] = 15
    """Steps after them that are forecast."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Steps from one window to the next."""

    @model_validator(mode="after")
    def _the_target_is_a_variable(self) -> WindowSpec:
        if self.target is not None and self.target not in self.of:
            raise ValueError(f"data.windows.target = {self.target!r} is none of data.windows.of: {', '.join(self.of)}")
        if twice := next((n for i, n in enumerate(self.of) if n in self.of[:i]), None):
            raise ValueError(f"data.windows.of names {twice!r} twice; name each variable once")
        return self

    @property
    def at(self) -> int:
        """The target's place among the variables."""
        return self.of.index(self.target) if self.target else 0


def windowed(tables: Sequence[Table], spec: WindowSpec, learned: float) -> list[Table]:
    """Each table's windows; the first `learned` (a share) of a series says what its variables are standardized by.

    A reading without a value takes that of the step before. DataError names a value that is no number, a column that
    is not there, a series that is too short for one window.
    """
    return [replace(table, rows=[row for name, steps in _series(table, spec).items()
                                 for row in _windows(table, name, steps, spec, learned)], lines=())
            for table in tables]


def _series(table: Table, spec: WindowSpec) -> dict[str, np.ndarray]:
    """Name -> readings in the order of time [steps, variables], those of one time averaged."""
    columns, clock = [spec.time] if isinstance(spec.time, str) else spec.time, Clock()
    found: dict[str, dict[tuple[Any, ...], list[list[float]]]] = {}
    for i, row in enumerate(table.rows):
        where = table.where(i)
        name = as_text(value_of(row, spec.series, where), spec.series, where) if spec.series else "series"
        when = tuple(clock(value_of(row, column, where), column, where) for column in columns)
        found.setdefault(name, {}).setdefault(when, []).append(
            [_number(value_of(row, column, where), column, where) for column in spec.of])
    return {name: _filled(np.stack([_mean(np.array(times[when])) for when in sorted(times)]), name, table, spec)
            for name, times in sorted(found.items())}


def _mean(readings: np.ndarray) -> np.ndarray:
    """Over the readings that are there; NaN where none is."""
    known = ~np.isnan(readings)
    return np.where(known.any(0), np.where(known, readings, 0.0).sum(0) / np.maximum(1, known.sum(0)), np.nan)


def _filled(steps: np.ndarray, name: str, table: Table, spec: WindowSpec) -> np.ndarray:
    """Gaps take the value before them, and those at the start the first that is there."""
    for j, column in enumerate(spec.of):
        known = np.flatnonzero(~np.isnan(steps[:, j]))
        if not len(known):
            raise DataError(f"{table.name}: series {name!r} has no reading of {column!r} at all; leave the column out "
                            "of data.windows.of, or the series out of the file")
        at = np.searchsorted(known, np.arange(len(steps)), side="right") - 1
        steps[:, j] = steps[known[np.maximum(at, 0)], j]
    return steps


def _windows(table: Table, name: str, steps: np.ndarray, spec: WindowSpec, learned: float) -> list[dict[str, Any]]:
    length = spec.past + spec.horizon
    if len(steps) < length:
        raise DataError(f"{table.name}: series {name!r} has {len(steps)} steps, and a window takes data.windows.past + "
                        f"horizon = {length}; give it more, or leave it out")
    head = steps[: max(spec.past, int(learned * len(steps)))]
    mean, spread = head.mean(0), head.std(0)
    spread = np.where(spread < SPREAD, 1.0, spread)
    scaled = ((steps - mean) / spread).astype(np.float32)
    out = []
    for start in range(0, len(steps) - length + 1, spec.stride):
        seen, after = scaled[start : start + spec.past], scaled[start + spec.past : start + length]
        out.append({SERIES: name, START: start, "past": seen.tolist(), "future": after.tolist(),
                    "target": spec.at, "scale": [float(mean[spec.at]), float(spread[spec.at])]})
    return out


def last_of_each(rows: Sequence[Mapping[str, Any]], which: np.ndarray, fraction: float, horizon: int = 1,
                 one: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(the last windows of each series, what is learned from): a window that shows what a test asks for is in neither.

    `one`: the last alone, whatever the fraction, if it is not 0 (leave-one-out).
    """
    by: dict[str, list[int]] = {}
    for i in which:
        by.setdefault(rows[i][SERIES], []).append(int(i))
    out, left = [], []
    for mine in by.values():
        mine.sort(key=lambda i: rows[i][START])
        count = min(int(fraction > 0) if one else round(fraction * len(mine)), len(mine) - 1)
        if not count:
            left += mine
            continue
        out += mine[len(mine) - count :]
        first = rows[mine[len(mine) - count]][START]
        kept = [i for i in mine if rows[i][START] <= first - horizon]
        left += kept or mine[:1]
    return np.array(sorted(out), int), np.array(sorted(left), int)


def _number(value: Any, column: str, where: str) -> float:
    """A reading; NaN where none is there (null, empty, NA)."""
    if value is None or (isinstance(value, str) and value.strip().casefold() in ("", "na", "nan", "null")):
        return math.nan
    try:
        number = float(value) if not isinstance(value, bool) else math.inf
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise DataError(f"{where}: {column!r} is {value!r:.80}; a reading must be a finite number, or empty")
    return number

"""Turns tables of interactions (who, what, when) into next-item rows; each user's last item is the test, as the field
has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from fedllm.core.errors import DataError
from fedllm.data.spec import Spec
from fedllm.data.table import Table
from fedllm.data.times import Clock
from fedllm.data.windows import SERIES, START
from fedllm.tasks.row import as_text, value_of

Count = Annotated[int, Field(ge=1, le=10_000)]


class SequenceSpec(Spec):
    """How interactions become rows: of each user, everything before an item is its history."""

    user: str = "user"
    """The column that says who; a user of two shops is two."""
    item: str = "item"
    """The column that says what: an item's name in words, which may begin with its shop and a slash
    (`Arts/Acrylic paint`): it is then ranked among its shop's items alone."""
    time: str = "time"
    """The column that orders a user's interactions."""
    history: Count = 20
    """Items of a history at most, the latest."""
    least: Annotated[int, Field(ge=2, le=10_000)] = 3
    """Users with fewer interactions are left out (5 is a 5-core's)."""


def sequenced(tables: Sequence[Table], spec: SequenceSpec) -> list[Table]:
    """Each table's rows; the other columns of a user's last interaction stay for the partition.

    DataError names a row without a user, an item or a time, and a table in which no user has enough.
    """
    return [replace(table, rows=_rows(table, spec), lines=()) for table in tables]


def _rows(table: Table, spec: SequenceSpec) -> list[dict[str, Any]]:
    users: dict[str, list[tuple[float, int, str, Mapping[str, Any]]]] = {}
    clock = Clock()
    for i, row in enumerate(table.rows):
        where = table.where(i)
        who, item = (as_text(value_of(row, c, where), c, where).strip() for c in (spec.user, spec.item))
        if not who or not item:
            raise DataError(f"{where}: {spec.user if not who else spec.item!r} is empty; every interaction has a user "
                            "and an item")
        users.setdefault(who, []).append((clock(value_of(row, spec.time, where), spec.time, where), i, item, row))
    out = []
    for who, done in users.items():
        done.sort(key=lambda one: one[:2])
        items, rest = [item for _, _, item, _ in done], done[-1][3]
        if len(items) >= spec.least:
            other = {n: v for n, v in rest.items() if n not in (spec.user, spec.item, spec.time)}
            out += [{**other, SERIES: who, START: at, "history": items[max(0, at - spec.history) : at],
                     "item": items[at]} for at in range(1, len(items))]
    if not out:
        raise DataError(f"{table.name}: no user has data.sequences.least = {spec.least} interactions")
    return out

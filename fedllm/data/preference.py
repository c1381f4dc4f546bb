"""Preference rows: a prompt with a chosen and a rejected answer; the chosen one is the row's response."""

from __future__ import annotations

from typing import Any

from fedllm.core.errors import DataError
from fedllm.data.federation import Row
from fedllm.data.templates import Render

ANSWERS = ("chosen", "rejected")


def preferring(render: Render) -> Render:
    """The template `render`, which also takes rows with `chosen` and `rejected` in the place of `response`.

    Such a row keeps `rejected`. A DataError names a row whose answers are equal, or that lacks one.
    """

    def both(row: Row, where: str) -> dict[str, Any]:
        if "response" in row or not any(name in row for name in ANSWERS):
            return render(row, where)
        for name in ANSWERS:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(f"{where}: '{name}' is {row.get(name)!r}; a preference row needs text in chosen and in "
                                "rejected")
        if row["chosen"] == row["rejected"]:
            raise DataError(f"{where}: 'chosen' and 'rejected' are equal ({row['chosen'][:40]!r}); a preference row "
                            "needs two different answers")
        made = [render({**row, "response": row[name]}, where) for name in ANSWERS]
        return {**made[0], "rejected": made[1]["response"]}

    return both


def rejected(row: Row) -> dict[str, Any]:
    """The same row with the rejected answer as its response; a DataError for a row that has none."""
    if "rejected" not in row:
        raise DataError(f"a preference row needs 'prompt', 'chosen' and 'rejected'; this one has "
                        f"{', '.join(map(str, row))}")
    return {**row, "response": row["rejected"]}

"""When something was, as a number that sorts as time passed; a time that cannot be put in order is refused."""

from __future__ import annotations

import datetime
import math
import re
from typing import Any

from fedllm.core.errors import DataError

FORMS = "a number, a date or time in ISO form (2026-11-30, 2026-11-30T08:30:00, 08:30), a month (2026-11) or a quarter"
MONTH, QUARTER = re.compile(r"(\d{4})-(\d\d)"), re.compile(r"(\d{4})-?Q([1-4])")
SLASHED = re.compile(r"(\d{4})([/.])(\d\d)\2(\d\d)(.*)", re.DOTALL)
"""From the year down, so that it sorts as ISO's does; 30/11/2026 and 11/30/2026 cannot be told apart and do not."""
DAY = 86_400.0


class Clock:
    """Reads the times of one table, each column in one way: a date beside a number, or 9:00 as text after 10:00, would
    put readings in an order in which nothing happened."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[str, str]] = {}

    def __call__(self, value: Any, column: str, where: str) -> float:
        """A number that is larger the later; DataError for what has no place in time, or not beside the others."""
        if (read := moment(value)) is None:
            raise DataError(f"{where}: {column!r} is {value!r:.80}, which is no time that can be put in order; it must "
                            f"be {FORMS}", kind="value")
        kind, number = read
        first, at = self._kinds.setdefault(column, (kind, where))
        if first != kind:
            raise DataError(f"{where}: {column!r} is {kind} ({value!r:.80}), and {first} in {at}; write the times of a "
                            "column one way", kind="value")
        return number


def moment(value: Any) -> tuple[str, float] | None:
    """(what kind of time it is, a number that grows with it); None for what is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, datetime.date | datetime.time):
        return _known(value)
    if isinstance(value, datetime.timedelta):
        return "a number", value.total_seconds()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return _written(str(value).strip()) if isinstance(value, str) else None
    return ("a number", number) if math.isfinite(number) else None


def _written(text: str) -> tuple[str, float] | None:
    if found := QUARTER.fullmatch(text):
        return "a quarter", 4.0 * int(found[1]) + int(found[2])
    text = f"{text}-01" if MONTH.fullmatch(text) else SLASHED.sub(r"\1-\3-\4\5", text)
    for read in (datetime.datetime.fromisoformat, datetime.time.fromisoformat):
        try:
            return _known(read(text))
        except ValueError:
            continue
    return None


def _known(value: datetime.date | datetime.time) -> tuple[str, float]:
    if isinstance(value, datetime.time):
        seconds = value.hour * 3600.0 + value.minute * 60.0 + value.second + value.microsecond / 1e6
        return "a time of day", seconds
    if not isinstance(value, datetime.datetime):
        return "a date", value.toordinal() * DAY
    zone = value.utcoffset()
    day = value.toordinal() * DAY + _known(value.time())[1]
    return ("a date", day) if zone is None else ("a date with its zone", day - zone.total_seconds())

"""Labels as users write them: names, or numbers that stand for names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from fedllm.core.errors import DataError
from fedllm.tasks.row import Row, as_text, drawn, is_blank, looks, names_in, nearest, value_of

WHOLE = re.compile(r"^(-?\d+)\.0+$")
"""A whole number as a column with gaps holds it."""


def label_names(values: Iterable[Any]) -> tuple[str, ...]:
    """The labels' names in sorted order (numbers by size), so that the index does not hang on the rows' order.

    A DataError names two that are one label written in two ways: another case, blanks, or here a name, there a number.
    """
    names = {str(value) for value in values}
    told_apart(names)
    one_kind(names)
    numeric = all(is_number(name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def told_apart(names: Iterable[str]) -> None:
    """Refuse labels that are one label written in two ways: by case, blanks, code points, or as a number."""
    seen: dict[str, str] = {}
    for name, form in itertools.product(sorted(names), (looks, drawn)):
        other = seen.setdefault(WHOLE.sub(r"\1", form(name)), name)
        if other != name:
            plain = " ".join(name.split()).casefold() == " ".join(other.split()).casefold()
            said = (f"{other!r:.80} and {name!r:.80} differ in case or blanks alone" if plain else
                    f"{other!a:.80} and {name!a:.80} look alike (they differ in code points, or by a .0)")
            raise DataError(f"the labels {said} and would be two classes; write them one way")
    numbers: dict[Decimal, str] = {}
    for name in sorted(names):
        if (value := _value(name)) is not None and (other := numbers.setdefault(value, name)) != name:
            raise DataError(f"the labels {other!r:.80} and {name!r:.80} are one number and would be two classes; write "
                            "them one way")


def _value(name: str) -> Decimal | None:
    """The number that a label is, in the digits of any script; None for a word."""
    try:
        value = Decimal(name.strip()) if len(name) <= 40 else None
    except InvalidOperation:
        return None
    return value if value is not None and value.is_finite() else None


def one_kind(names: Iterable[str]) -> None:
    """Refuse labels of which some are numbers and some are words."""
    numbers, words = [n for n in sorted(names) if is_number(n)], [n for n in sorted(names) if not is_number(n)]
    if numbers and words:
        raise DataError(f"labels are numbers here and words there ({numbers[0]!r:.80}, {words[0]!r:.80}) and would all "
                        "be classes of their own; write them one way")


def is_number(name: str) -> bool:
    """Whether a label is a whole number in digits, and not in so many that none would count with it."""
    return len(name) <= 20 and name.removeprefix("-").isdecimal()


def raw_label(row: Row, where: str) -> int | str:
    """The row's label as the user wrote it; a DataError where it is no int and no string."""
    label = value_of(row, "label", where)
    if isinstance(label, bytes):
        label = as_text(label, "label", where)
    if isinstance(label, float) and label.is_integer():  # a column of whole numbers with gaps, as pandas keeps it
        label = int(label)
    if not isinstance(label, int | str) or is_blank(str(label)):
        raise DataError(f"{where}: 'label' is {label!r:.80}; a label must be a string or a whole number"
                        + (" (numbers that are foreseen are of data.task: regression)" * isinstance(label, float)),
                        kind="label")
    return label


def index_of(label: int | str, labels: Sequence[str], where: str, column: str = "label") -> int:
    """The label's place in [0, len(labels)): by its name, or a number that is a place already.

    A number is a place only where no label is called by a number: of ["1", ..., "5"] a 0 is none.
    """
    name = str(label)
    if name in labels:
        return list(labels).index(name)
    if is_number(name) and 0 <= int(name) < len(labels) and not any(is_number(n) for n in labels):
        return int(name)
    raise DataError(f"{where}: {column!r} is {label!r:.80}; the labels are {names_in(labels)}{nearest(name, labels)}",
                    kind="label")

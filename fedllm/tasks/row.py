"""What a row is before and after it is read, and how an error speaks of it."""

from __future__ import annotations

import datetime
import decimal
import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedllm.core.errors import DataError

Row = Mapping[str, Any]
"""One example, in the columns of its task (`Task.columns`). `category`, where present, is a string used for skew and
per-category scores."""
IGNORE = -100


class Placed(dict[str, Any]):
    """A row that knows where it came from, for errors that are found later."""

    __slots__ = ("file", "line", "row")

    def __init__(self, values: Mapping[str, Any], file: str = "", row: int = 0, line: int = 0) -> None:
        """`row` and `line` count from 1; 0: not known."""
        super().__init__(values)
        self.file, self.row, self.line = file, row, line

    def __reduce__(self) -> tuple[Any, ...]:
        return Placed, (dict(self), self.file, self.row, self.line)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in a text: blanks, control characters, marks of no width."""
    return not text.strip() or all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


TWINS = str.maketrans("АВЕКМНОРСТУХІЈЅаеорсухѕіјһԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧορν",
                      "ABEKMHOPCTYXIJSaeopcyxsijhdqwABEZHIKMNOPTYXopv")
"""Letters of other alphabets that are drawn as Latin ones are."""


def drawn(text: str) -> str:
    """What `looks` says of a text whose letters are all told as the Latin ones that are drawn like them."""
    return looks(unicodedata.normalize("NFKC", text).translate(TWINS))


def looks(text: str) -> str:
    """What a text looks like: case, kinds of blanks, marks of no width and the ways to write one character go."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c for c in folded if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf")).split())


def where_of(row: Row, i: int) -> str:
    """A row as an error names it: its place in its file, or that it is the i-th (from 1)."""
    if not isinstance(row, Placed) or not row.file:
        return f"row {i}"
    return f"{row.file}, row {row.row}" + (f" (line {row.line})" if row.line else "")


def bad_row(row: Row, i: int, why: str, kind: str = "value") -> DataError:
    """The error of a row that cannot be used, said as `<where it is><why>`."""
    error = DataError(f"{where_of(row, i)}{why}", kind=kind)
    return error.at(row.file, row.row) if isinstance(row, Placed) else error


@dataclass(frozen=True)
class Encoded:
    """One row as tensors: `ids` int32 [T]; `labels` int64 [T] where tokens are predicted (-100: not learned), an int
    where rows are."""

    ids: np.ndarray
    labels: np.ndarray | int
    n_target: int
    """Tokens that the loss scores, or 1 where rows are labelled: what to weight a mean loss by."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What of the row is not text, by name: pixels [3, H, W], features [d], series [L, channels], a target, ..."""
    pads: Mapping[str, float] = field(default_factory=dict)
    """Parts whose first axis may differ from row to row, and what fills the shorter; all others have one shape."""
    cut: str = ""
    """What `max_length` took: "answer" (its end is not learned), "prompt" (its start is gone), "text", or nothing."""

    @property
    def prompt(self) -> np.ndarray:
        """What `generate` continues: the tokens before the first that is learned, int32."""
        return self.ids if isinstance(self.labels, int) else self.ids[: int(np.argmax(self.labels != IGNORE))]

    @property
    def form(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, type and shape of each part, without an axis that is padded: rows of one form fit into one batch."""
        return tuple((n, p.dtype.str, p.shape[1:] if n in self.pads else p.shape)
                     for n, p in sorted(self.parts.items()))


def same_form(rows: Iterable[Encoded]) -> None:
    """A DataError names the first row (from 1) whose parts have another shape or other names than those before it."""
    first: Encoded | None = None
    for i, row in enumerate(rows, start=1):
        first = first or row
        if row.form != first.form:
            raise DataError(f"row {i} has the parts {_told(row)}, and row 1 has {_told(first)}: rows of a client must "
                            "have the same parts in the same shapes; cut or fill them before")


def _told(row: Encoded) -> str:
    return ", ".join(f"{n} {list(p.shape)}" for n, p in sorted(row.parts.items())) or "none"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'answer'?` where a known name is close, else nothing."""
    names = [str(k) for k in known]
    alike = [k for k in names if k.strip().casefold() == str(name).strip().casefold()]
    close = alike or difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r:.80}?" if close else ""


def value_of(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a row; a DataError names the row, the missing field, those present and the nearest."""
    if name not in row:
        parted = len(row) == 1 and name in re.split(r"[,;|\t]", str(next(iter(row))))
        raise DataError(f"{where} has no field {name!r:.80}; it has {names_in(row)}" + (
            "; its fields are parted by another sign than its ending says (.csv: a comma, .tsv: a tab)" if parted else
            nearest(name, row)))
    return row[name]


def names_in(row: Iterable[object]) -> str:
    """A row's names as an error shows them: the first twenty, and forty characters of each."""
    names = [str(name) for name in row]
    return ", ".join(f"{n[:37]}..." if len(n) > 40 else n for n in names[:20]) + (", ..." if len(names) > 20 else "")


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text (bytes are read as UTF-8)."""
    value = value_of(row, name, where)
    if not isinstance(value, str | bytes):
        raise DataError(f"{where}: {name!r} is {value!r:.80}; it must be a string", kind="value")
    return as_text(value, name, where)


def as_text(value: Any, name: str, where: str) -> str:
    """The text of a value: strings, UTF-8 bytes, numbers (a whole one without `.0`), truth values, dates.

    A DataError names what has no one text: objects, lists, NaN, half characters, other bytes. None is no text ("").
    """
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {name!r} holds half a character (a lone UTF-16 surrogate)",
                            kind="value") from None
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise DataError(f"{where}: {name!r} is bytes that are not UTF-8 text", kind="value") from None
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, bool | int | datetime.date | datetime.time | decimal.Decimal) and value == value:
        return str(value)
    raise DataError(f"{where}: {name!r} is {_shown(value)}; only text and numbers can be put into a text", kind="value")


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", tuple: "a list", float: "not a finite number", type(None): "null"}
    said = f"{value!r}"
    return f"{kinds.get(type(value), f'of type {type(value).__name__}')} ({said[:60]}{'...' * (len(said) > 60)})"


def numbers_of(row: Mapping[str, Any], name: str, where: str) -> np.ndarray:
    """A field of numbers (a list, or a list of lists of one length) as a float32 array; every one must be finite."""
    value = value_of(row, name, where)
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name!r} must hold numbers, or lists of them that are of one length") from None
    if array.ndim == 0 or not array.size or not np.isfinite(array).all():
        raise DataError(f"{where}: {name!r} must be a list of numbers without gaps, NaN or infinity")
    return array

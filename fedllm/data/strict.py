"""Reads JSON, delimited text and Parquet as what they say, or not at all: nothing is dropped, joined or made up."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedllm.core.errors import DataError

LONGEST = 2**31 - 1
"""Characters of one field; Python's own limit of 131,072 is shorter than many a document."""
LINE = 1 << 24
"""Characters (or bytes) of one line: 16 million are more than any document has, and what a tokenizer can take."""

TAB = "\t"
APART = re.compile(r'\s+"(?:[^"]|"")*"\s*')
"""A field in quotes with a blank before them, as `a, "b"` has it: the quotes would be read as part of the text."""

WHOLE = 1 << 28
"""Bytes of a file that is one value (.json): it is read whole, and a value may take twenty times its bytes."""


def whole(path: Path) -> str:
    """The text of a file that is one value; DataError for one that is too large, before it is read."""
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > WHOLE or len(data := file.read(WHOLE + 1)) > WHOLE:
            raise DataError(f"{path} has {size:,} bytes, and a .json file (data.source, data.test, data.public) "
                            f"may have {WHOLE:,}, as it is read whole; write an object a line and call it .jsonl, "
                            "which has no such bound", kind="unreadable")
    return data.decode("utf-8-sig")


def bounded(file: Any, path: Path, most: int | None = None) -> Iterator[Any]:
    """The lines of an open file; DataError at one that has no end in sight, before more of it is read."""
    most, number = LINE if most is None else most, 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise DataError(f"{path}, line {number} is longer than {most:,} characters, which is no row; cut it into "
                            "rows", kind="broken")
        yield line


def loads(text: str, where: str) -> Any:
    """The value of a JSON text; a DataError names the place of what is broken, or means nothing certain.

    Refused beside broken JSON: a key given twice (which one counts?), NaN and infinity (no JSON), numbers too long and
    brackets too deep to be held, half a character (a lone UTF-16 surrogate, of which no text can be made).
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, where), parse_float=_finite,
                           parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error.msg} at column {error.colno})", kind="broken") from error
    except RecursionError:
        raise DataError(f"{where}: broken JSON (its brackets are nested too deep to be read)", kind="broken") from None
    except DataError:
        raise
    except ValueError as error:
        why = "a number has too many digits" if "digits" in str(error) else str(error)
        raise DataError(f"{where}: {why}", kind="broken") from None
    if "\\u" in text and (path := half_character(value)) is not None:
        raise DataError(f"{where}: {path or 'the value'} holds half a character (a lone UTF-16 surrogate), of which no "
                        "text can be made", kind="broken")
    return value


def _object(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: the key {twice!r:.80} is given twice", kind="broken")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large to be held")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write null, or leave the row out")


def half_character(value: Any, path: str = "") -> str | None:
    """Where a text with a lone surrogate lies in a JSON value ("" is the value itself); None where there is none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return path
        return None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        name = f"{path}.{str(key)[:40]}" if path else f"{key!r:.42}"
        if isinstance(key, str) and half_character(key) is not None:
            return "a key"
        if (found := half_character(inner, name)) is not None:
            return found
    return None


def delimited(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The header and rows of a CSV or TSV file, each with the line on which it begins; blank lines are passed over.

    Values stay text. A DataError names the row (the header is row 1) and line of a row with another number of fields
    than the header, and of a quote that is not closed, or closed so late that it has swallowed rows.
    """
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines: list[str] = []
        reader = csv.reader(_kept(file, lines, path), delimiter=delimiter, strict=True)
        begins, number, width, header = 1, 0, 0, [""]
        while True:
            lines.clear()
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}, line {begins}: {_why(error, begins, reader.line_num)}", row=number,
                                kind="broken") from None
            if row is None:
                return
            if row:
                number += 1
                width = width or len(row)
                if len(row) != width or _swallowed(lines, delimiter, width):
                    said = (f"Row #{number}: Expected {width} columns, got {len(row)}" if len(row) != width else
                            f"Row #{number}: a quote that opens here closes on line {reader.line_num} and swallows "
                            "what look like rows of their own; close it, or write \"\" for a quote mark")
                    raise DataError(f"{path}, line {begins}: {said} (the header is row 1)", row=number - 1,
                                    kind="broken")
                if odd := next((v for v in row if APART.fullmatch(v)), None):
                    raise DataError(f"{path}, line {begins}: Row #{number} has a blank before a quote, which is then "
                                    f"none ({odd!r:.60}); take out the blanks that stand beside the "
                                    f"{'tabs' if delimiter == TAB else 'commas'}", row=number - 1, kind="broken")
                if number > 1 and width > 1 and [row[0].removeprefix("\ufeff"), *row[1:]] == header:
                    raise DataError(f"{path}, line {begins}: Row #{number} is the header once more, as files have it "
                                    "that were joined; take the line out", row=number - 1, kind="broken")
                header = row if number == 1 else header
                yield begins, row
            begins = reader.line_num + 1


def columnar(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file; numbers of half and single precision are the decimal ones that they stand for (0.1,
    and not 0.10000000149). A DataError names what cannot be read, and columns that have one name."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: {_named(twice)} is the name of more than one column", kind="broken")
        kinds = {f.name: np.float16 if pa.types.is_float16(f.type) else np.float32 for f in file.schema_arrow
                 if pa.types.is_float16(f.type) or pa.types.is_float32(f.type)}
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield {**{n: present(v) for n, v in row.items()}, **{
                    n: None if row[n] is None else float(str(kind(row[n]))) for n, kind in kinds.items()}}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}", kind="unreadable") from error


def present(value: Any, inside: bool = False) -> Any:
    """A value of a column with the null keys gone of objects that lie in objects: columnar files give every object the
    keys of all others, so that a call of one tool would be learned with the arguments of each."""
    if isinstance(value, list):
        return [present(v, inside) for v in value]
    if isinstance(value, dict):
        return {n: present(v, True) for n, v in value.items() if v is not None or not inside}
    return value


def named_once(header: Sequence[str], path: Path) -> None:
    """A DataError for a header that gives two columns one name."""
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header names {_named(twice)} more than once", kind="broken")


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"{name!r:.80}" for name in names[:8])


def _kept(file: Iterator[str], lines: list[str], path: Path) -> Iterator[str]:
    for line in bounded(file, path):
        if "\0" in line:
            raise DataError(f"{path} holds NUL bytes: it is UTF-16, or damaged; save it as UTF-8", kind="unreadable")
        lines.append(line)
        yield line


def _why(error: csv.Error, begins: int, ends: int) -> str:
    if "unexpected end of data" in str(error):
        return f"a quote that opens in the row beginning here is never closed (the file ends on line {ends})"
    if "expected after" in str(error):
        return (f"a quote is not closed where it opened: on line {ends} text follows its end; close it, or write \"\" "
                "for a quote mark")
    return str(error)


def _swallowed(lines: Sequence[str], delimiter: str, width: int) -> bool:
    """Whether a row over several lines looks like several rows: each line by itself has the header's fields."""
    return len(lines) > 3 and width > 1 and all(
        line.count(delimiter) == width - 1 for line in lines if line.strip())

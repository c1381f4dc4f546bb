"""Reads rows one by one from files of any size: JSONL, text lines, CSV, TSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError
from fedllm.data.sources import resolve
from fedllm.data.strict import bounded, columnar, delimited, loads, named_once

Placed = tuple[int, str, dict[str, Any], bytes]
"""Number of the row, how an error names it, the row, and the row as one line of JSON."""


def stream_rows(source: str, share: tuple[int, int] = (0, 1), block: int = 4096) -> Iterator[Placed]:
    """Rows of blocks w, w + W, w + 2 W, ... of a file, for `share` = (w, W); raises DataError with the line."""
    path = resolve(source)
    if not path.is_file():
        raise DataError(f"{source!r}: no such file; grouping reads single files, one after another")
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; grouping reads {', '.join(FORMATS)}")
    mine = lambda i: i // block % share[1] == share[0]  # noqa: E731
    try:
        yield from FORMATS[kind](path, mine)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _jsonl(path: Path, mine: Any) -> Iterator[Placed]:
    with path.open("rb") as file:
        for i, line in enumerate(bounded(file, path)):
            if mine(i) and (raw := line.removeprefix(b"\xef\xbb\xbf").strip()):
                where = f"{path.name}, line {i + 1}"
                row = loads(raw.decode(), where)
                if not isinstance(row, dict):
                    raise DataError(f"{where} is a JSON {type(row).__name__}, not an object with named fields")
                yield i, where, row, raw


def _text(path: Path, mine: Any) -> Iterator[Placed]:
    with path.open(encoding="utf-8-sig") as file:
        for i, line in enumerate(bounded(file, path)):
            if mine(i) and line.strip():
                row = {"text": line.rstrip("\r\n")}
                yield i, f"{path.name}, line {i + 1}", row, packed(row, path, i)


def _delimited(delimiter: str) -> Any:
    def read(path: Path, mine: Any) -> Iterator[Placed]:
        found = delimited(path, delimiter)
        _, header = next(found, (0, []))
        named_once(header, path)
        for i, (line, values) in enumerate(found):
            if mine(i):
                row = dict(zip(header, values, strict=True))
                yield i, f"{path.name}, row {i + 2} (line {line})", row, packed(row, path, i)

    return read


def _parquet(path: Path, mine: Any) -> Iterator[Placed]:
    for i, row in enumerate(columnar(path)):
        if mine(i):
            yield i, f"{path.name}, row {i + 1}", row, packed(row, path, i)


def packed(row: dict[str, Any], path: Path, i: int) -> bytes:
    """One line of JSON."""
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name}, row {i + 1} cannot be kept as JSON: {error}") from error


FORMATS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".txt": _text, ".csv": _delimited(","), ".tsv": _delimited("\t"),
           ".parquet": _parquet}

"""Reads users' own rows: JSONL, JSON, CSV, Parquet, text lines, a saved `datasets` folder or a Hub id."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.files import PACKAGE, each_once, files_in, identities, identity, in_package, no_pointer, these
from fedllm.data.hub import hub_table, saved_table
from fedllm.data.memory import Held
from fedllm.data.strict import bounded, columnar, delimited, loads, named_once, whole
from fedllm.data.table import Table
from fedllm.tasks.row import as_text, nearest, value_of

__all__ = ["map_fields", "nearest", "parted", "read_tables", "resolve", "value_of"]
log = logging.getLogger(__name__)
Reader = Callable[[Path, Held], Table]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
OTHERWISE = {(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"): "unpack it first",
             (".xlsx", ".xls", ".ods", ".numbers"): "save the sheet as CSV, in UTF-8",
             (".arrow", ".feather", ".orc", ".avro", ".h5", ".sqlite", ".db"): "write it as Parquet or JSONL",
             (".pkl", ".pickle", ".pt", ".npy", ".npz", ".joblib"): "such a file may run code when it is read; write "
                                                                   "it as Parquet or JSONL"}
"""Endings that rows often have and that are not read, and what to do about it."""
SPLITS = "dataset_dict.json"
"""In a saved folder of several splits."""
USER = re.compile(r"://[^/@\s]+@")
"""A user, and mostly a password or a token, in a URL."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def map_fields(row: Mapping[str, Any], fields: Mapping[str, str | list[str]], where: str) -> dict[str, Any]:
    """The row with each mapped field under fedllm's name; columns that are not mapped stay.

    Several columns are one text, a blank line between them; those that are null or blank are left out.
    """
    return {**row, **{ours: value_of(row, theirs, where) if isinstance(theirs, str) else _joined(row, theirs, where)
                      for ours, theirs in fields.items()}}


def _joined(row: Mapping[str, Any], columns: Sequence[str], where: str) -> str | None:
    texts = [as_text(value_of(row, name, where), name, where) for name in columns]
    return "\n\n".join(t for t in texts if t.strip()) or None


def resolve(path: str) -> Path:
    """Where a path points; `shared:x` is x in the folder FEDLLM_DATA, or else `../shared/data` beside the checkout, and
    `package:name/file` a file that an installed package brings."""
    if path.startswith(PACKAGE):
        return in_package(path)
    if not path.startswith("shared:"):
        try:
            found = Path(path).expanduser()
            found.exists()
        except (OSError, RuntimeError, ValueError) as error:  # longer than any path may be, the home of nobody
            raise DataError(f"{path[:200]!r} is no path: {error}"[:400]) from None
        return found
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("FEDLLM_DATA") or beside)
    found = folder / path.removeprefix("shared:")
    if not found.exists():
        raise DataError(f"{path!r}: there is no {found}; FEDLLM_DATA is {os.environ.get('FEDLLM_DATA', 'not set')!r} "
                        f"and the default folder is {beside}")
    return found


def read_tables(source: str | Sequence[str], split: str = "train", subset: str | None = None,
                but: Iterable[Path] = (), documents: Mapping[str, Reader] = MappingProxyType({})) -> list[Table]:
    """All tables of a source: a path, a list of paths, a folder of files, a saved `datasets` folder or a Hub id.

    `split` and `subset` pick a part of a `datasets` source. Files `but` are left out of folders under any name, as are
    hidden files (`.x`, `._x`) and those that are about the data (README, LICENSE). `documents` read files by their
    ending in the place of the usual ones, in folders of a folder too; one that holds nothing is left out (it is said).
    Raises DataError for what is missing, empty, broken or named twice.
    """
    paths = [source] if isinstance(source, str) else list(source)
    if not paths:
        raise DataError("data.source is an empty list: give at least one path")
    held, room, known = identities(but), Held(), {**READERS, **documents}
    tables = [table for path in paths for table in _read(path, split, subset, held, room, known, bool(documents))]
    if documents and (empty := [t.name for t in tables if not t.rows]) and len(empty) < len(tables):
        log.warning("%s left out, as what holds nothing", these(empty))
        tables = [t for t in tables if t.rows]
    for table in tables:
        if not table.rows:
            raise DataError(f"{table.name} is empty: it holds no rows", file=table.name, kind="empty")
    each_once(table.path for table in tables if table.path)
    return tables


def _read(source: str, split: str, subset: str | None, but: frozenset[tuple[int, int]], room: Held,
          known: Mapping[str, Reader], deep: bool) -> list[Table]:
    if source.startswith("hub:"):
        return [hub_table(source.removeprefix("hub:"), split, subset)]
    path = resolve(source)
    if path.is_dir():
        return _folder(path, split, but, room, known, deep)
    if path.is_file():
        if identity(path) in but:
            raise DataError(f"{source!r} is both in data.source and held out (data.test or data.public): nothing may "
                            "be trained on and tested on; name it once", file=str(path))
        return [_file(path, room, known)]
    if path.exists():
        raise DataError(f"{source!r} is neither a file nor a folder (a pipe, a socket or a device); rows are read from "
                        "files", file=str(path), kind="unreadable")
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in known:
        return [hub_table(source, split, subset)]
    raise DataError(f"{USER.sub('://***@', source)!r}: no such file or folder (looked in {Path.cwd()}); "
                    f"{_instead(source)}")


def _instead(source: str) -> str:
    """What may have been meant by a path that leads to nothing."""
    if "://" in source:
        return "nothing is fetched from a URL: fetch the file, and give its path"
    if any(c in source for c in "*?[$%"):
        return "patterns and variables are not put in: give a file, a folder, or a list of them"
    return "a dataset of the Hub is written 'owner/name' or 'hub:name'"


def parted(sources: Sequence[Any], split: str, subset: str | None) -> None:
    """A RecipeError for a split or a configuration of sources that have none: all rows would be read in its place."""
    paths = [path for one in sources for path in (one if isinstance(one, list) else [one]) if isinstance(path, str)]
    for key, value, plain, of in (("split", split, "train", "the Hub, or of a saved one of several splits"),
                                  ("subset", subset, None, "the Hub")):
        if value != plain and not any(_has_parts(path, key == "split") for path in paths):
            raise RecipeError(f"data.{key} = {value!r} picks a part of a dataset of {of}, and {paths[0]!r} is none; "
                              "leave the key out, and name the file that is meant")


def _has_parts(source: str, saved: bool) -> bool:
    if source.startswith((PACKAGE, "sim:", "grouped:")):
        return False
    path = resolve(source.removeprefix("hub:"))
    return source.startswith("hub:") or not path.exists() or (saved and (path / SPLITS).exists())


def _file(path: Path, room: Held, known: Mapping[str, Reader]) -> Table:
    reader = known.get(path.suffix.lower())
    if reader is None:
        how = next((f"; {how}" for endings, how in OTHERWISE.items() if path.suffix.lower() in endings), "")
        raise DataError(f"{path}: unknown extension {path.suffix!r}; known are {', '.join(known)}{how}")
    try:
        no_pointer(path)
        return replace(reader(path, room), path=path.resolve(), folder=path.parent)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8", file=str(path),
                        kind="unreadable") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", file=str(path),
                        kind="unreadable") from None
    except DataError as error:
        raise error.at(str(path), 0) from error.__cause__


def _folder(path: Path, split: str, but: frozenset[tuple[int, int]], room: Held, known: Mapping[str, Reader],
            deep: bool) -> list[Table]:
    """A saved `datasets` folder is one table, and so is a folder of pictures, with a folder for each label; any other
    folder is one table for each file with a known extension."""
    if (path / "state.json").exists() or (path / SPLITS).exists():
        return [saved_table(path, split)]
    files = files_in(path, known, but, deep)
    if not files and (pictures := sorted(p for p in path.glob("*/*") if p.suffix.lower() in PICTURES)):
        return [Table(str(path), [{"image": str(p), "label": p.parent.name} for p in pictures])]
    if not files:
        inside = sorted(p.name + "/" for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise DataError(f"{path}: the folder holds no saved dataset, no folders of pictures ({', '.join(PICTURES)}), "
                        f"and no file with one of {', '.join(known)}"
                        + (f"; {these(inside)} not looked into: name the folder itself" if inside and not deep else ""))
    return [_file(file, room, known) for file in files]


def _object(value: Any, where: str, lines: bool = False) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "; one JSON list over the whole file is called .json" if lines and isinstance(value, list) else ""
        raise DataError(f"{where} is a JSON {type(value).__name__}, not an object with named fields{hint}",
                        kind="broken")
    return value


def _jsonl(path: Path, room: Held) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(bounded(file, path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                room.takes(path, len(line))
                try:
                    rows.append(_object(loads(line, where), where, True))
                except DataError as error:
                    raise error.at(str(path), len(rows) + 1) from None
                lines.append(number)
    return Table(str(path), rows, lines)


def _json(path: Path, room: Held) -> Table:
    text = whole(path)
    try:
        value = loads(text, str(path)) if text.strip() else []
    except DataError as error:
        if isinstance(broken := error.__cause__, json.JSONDecodeError):
            hint = "; with an object a line the file is called .jsonl" if broken.msg == "Extra data" else ""
            raise DataError(f"{path}, line {broken.lineno}: broken JSON ({broken.msg} at column {broken.colno}){hint}",
                            kind="broken") from error
        raise
    if isinstance(value, dict) and value and all(isinstance(rows, list) for rows in value.values()):
        return _by_client(value, path)
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not a list of objects, nor an object that "
                        "holds a list of objects for each client", kind="broken")
    return Table(str(path), [_object(row, f"{path}, row {i}") for i, row in enumerate(value, start=1)])


def _by_client(value: Mapping[str, list[Any]], path: Path) -> Table:
    """Rows by client, as FedLLM-Bench keeps them; whose a row is stands in its column `client`."""
    rows = [(client, _object(row, f"{path}, client {client!r}, row {i}"))
            for client, listed in value.items() for i, row in enumerate(listed, start=1)]
    if odd := next((c for c, row in rows if row.get("client", c) != c), None):
        raise DataError(f"{path}: a row under {odd!r} has a column 'client' that says another; rename it",
                        kind="broken")
    return Table(str(path), [{**row, "client": client} for client, row in rows])


def _delimited(delimiter: str) -> Reader:
    """Values stay text (`007` is no number here)."""

    def read(path: Path, room: Held) -> Table:
        found = delimited(path, delimiter)
        _, header = next(found, (0, []))
        if not header:
            raise DataError(f"{path} is empty: it holds no rows", kind="empty")
        named_once(header, path)
        rows, lines = [], []
        for line, row in found:
            room.takes(path, sum(map(len, row)))
            rows.append(dict(zip(header, row, strict=True)))
            lines.append(line)
        return Table(str(path), rows, lines)

    return read


def _parquet(path: Path, room: Held) -> Table:
    rows = []
    for row in columnar(path):
        room.takes(path, sum(len(v) if isinstance(v, str | bytes) else len(repr(v)) for v in row.values()))
        rows.append(row)
    return Table(str(path), rows)


def _text(path: Path, room: Held) -> Table:
    with path.open(encoding="utf-8-sig") as file:
        lines = []
        for line in bounded(file, path):
            room.takes(path, len(line))
            lines.append(line.rstrip("\n"))
    if any("\0" in line for line in lines):
        raise DataError(f"{path} holds NUL bytes: it is UTF-16, or damaged; save it as UTF-8", kind="unreadable")
    kept = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    return Table(str(path), [{"text": line} for _, line in kept], [number for number, _ in kept])


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
    ".txt": _text,
}

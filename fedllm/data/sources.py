"""Reads users' own rows: JSONL, JSON, CSV, Parquet, text lines, a saved `datasets` folder or a Hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError
from fedllm.tasks.row import nearest, value_of

__all__ = ["Table", "map_fields", "nearest", "read_tables", "resolve", "value_of"]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Table:
    """The rows of one file or dataset, and how an error should speak of them."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    lines: Sequence[int] = ()
    """JSONL and text: the line of each row, counted from 1, since blank lines are skipped."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names by column, where a `datasets` dataset declares them."""

    folder: Path | None = None
    """Where relative paths in rows begin; None: where the program runs."""

    def where(self, i: int) -> str:
        """Row `i` (from 0) as an error names it: `notes.jsonl, row 3 (line 5)`."""
        return f"{self.name}, row {i + 1}" + (f" (line {self.lines[i]})" if self.lines else "")


def map_fields(row: Mapping[str, Any], fields: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with each mapped field under fedllm's name; columns that are not mapped stay."""
    return {**row, **{ours: value_of(row, theirs, where) for ours, theirs in fields.items()}}


def resolve(path: str) -> Path:
    """Where a path points; `shared:x` is x in the folder FEDLLM_DATA, or else `../shared/data` beside the checkout."""
    if not path.startswith("shared:"):
        return Path(path).expanduser()
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("FEDLLM_DATA") or beside)
    found = folder / path.removeprefix("shared:")
    if not found.exists():
        raise DataError(f"{path!r}: there is no {found}; FEDLLM_DATA is {os.environ.get('FEDLLM_DATA', 'not set')!r} "
                        f"and the default folder is {beside}")
    return found


def read_tables(source: str | Sequence[str], split: str = "train", subset: str | None = None) -> list[Table]:
    """All tables of a source: a path, a list of paths, a folder of files, a saved `datasets` folder or a Hub id.

    `split` and `subset` pick a part of a `datasets` source. Raises DataError for what is missing, empty or broken.
    """
    paths = [source] if isinstance(source, str) else list(source)
    if not paths:
        raise DataError("data.source is an empty list: give at least one path")
    tables = [table for path in paths for table in _read(path, split, subset)]
    for table in tables:
        if not table.rows:
            raise DataError(f"{table.name} is empty: it holds no rows")
    return tables


def _read(source: str, split: str, subset: str | None) -> list[Table]:
    if source.startswith("hub:"):
        return [_hub(source.removeprefix("hub:"), split, subset)]
    path = resolve(source)
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        return [_file(path)]
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS:
        return [_hub(source, split, subset)]
    raise DataError(f"{source!r}: no such file or folder (looked in {Path.cwd()}); a dataset of the Hub is written "
                    "'owner/name' or 'hub:name'")


def _file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; known are {', '.join(READERS)}")
    try:
        return replace(reader(path), folder=path.parent)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _folder(path: Path, split: str) -> list[Table]:
    """A saved `datasets` folder is one table, and so is a folder of pictures, with a folder for each label; any other
    folder is one table for each file with a known extension."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return [_saved(path, split)]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    if not files and (pictures := sorted(p for p in path.glob("*/*") if p.suffix.lower() in PICTURES)):
        return [Table(str(path), [{"image": str(p), "label": p.parent.name} for p in pictures])]
    if not files:
        raise DataError(f"{path}: the folder holds no saved dataset, no folders of pictures ({', '.join(PICTURES)}), "
                        f"and no file with one of {', '.join(READERS)}")
    return [_file(file) for file in files]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a JSON {type(value).__name__}, not an object with named fields")
    return value


def _jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno})") from error
            rows.append(_object(value, f"{path}, line {number}"))
            lines.append(number)
    return Table(str(path), rows, lines)


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not a list of objects")
    return Table(str(path), [_object(row, f"{path}, row {i}") for i, row in enumerate(value, start=1)])


def _delimited(delimiter: str) -> Callable[[Path], Table]:
    """Values stay text (`007` is no number here); one thread, since only then Arrow's errors name the row."""

    def read(path: Path) -> Table:
        import pyarrow as pa
        from pyarrow import csv

        if not path.read_bytes().strip():
            raise DataError(f"{path} is empty: it holds no rows")
        try:
            table = csv.read_csv(
                path,
                read_options=csv.ReadOptions(use_threads=False),
                parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=csv.ConvertOptions(default_column_type=pa.string(), strings_can_be_null=False),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: {error} (the header is row 1)") from error
        twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the header names {', '.join(twice)} more than once")
        return Table(str(path), table.to_pylist())

    return read


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return Table(str(path), parquet.ParquetFile(path).read().to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error


def _text(path: Path) -> Table:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    kept = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    return Table(str(path), [{"text": line} for _, line in kept], [number for number, _ in kept])


def _dataset(name: str, data: Any) -> Table:
    """Class numbers become their names (a name may itself be a number), and pictures stay the files that they are."""
    from datasets import ClassLabel, Image

    def names(kind: Any, value: Any) -> Any:
        known = kind.names if isinstance(kind, ClassLabel) else None
        if known is None:
            return [names(kind.feature, v) for v in value]
        return known[value] if isinstance(value, int) and 0 <= value < len(known) else value

    classes: dict[str, tuple[str, ...]] = {}
    for column, kind in data.features.items():
        if isinstance(kind, Image):
            data = data.cast_column(column, Image(decode=False))
        single = vars(kind).get("feature", kind)  # of a list: what it holds
        if isinstance(single, ClassLabel):
            classes[column] = tuple(single.names)
    rows = [{c: names(data.features[c], v) if c in classes and v is not None else v for c, v in row.items()}
            for row in data.to_list()]
    return Table(name, rows, classes=classes)


def _saved(path: Path, split: str) -> Table:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a saved dataset that can be read: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        data = value_of(data, split, f"{path}, a dataset of several splits,")
    return _dataset(str(path), data)


def _hub(name: str, split: str, subset: str | None) -> Table:
    import datasets

    try:
        return _dataset(name, datasets.load_dataset(name, subset, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        # Hub errors run over many lines; the first says what happened.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the dataset {name!r} is no local file and could not be reached on the Hub ({cause}); "
                        "check the id and the connection, or give the path of a local file") from error


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
    ".txt": _text,
}

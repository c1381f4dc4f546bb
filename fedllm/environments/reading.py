"""Tools that read, and one that writes: arithmetic, a local SQLite database, and the files of one folder."""

from __future__ import annotations

import ast
import operator
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from fedllm.environments.toolbox import PATIENCE, Tool

MOST = 10**15
"""No number of the calculator is larger."""
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
         ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
ROWS = 20
"""Rows of an answer."""
LARGEST = 1 << 20
"""Bytes of one value of a database, and of a file that is read."""


def calculator() -> Tool:
    """`calc 12 + 7`: numbers and + - * / // %, of at most 200 characters."""
    return Tool("calc", "calc EXPRESSION: the value of numbers joined by + - * / // % and brackets", reckon, ends=True)


def reckon(text: str) -> str:
    """The value of an expression; ValueError for one that is none, or too large."""
    if len(text) > 200:
        raise ValueError("an expression has at most 200 characters")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text[:40]!r} is no expression") from None
    return str(int(value) if float(value).is_integer() else round(value, 6))


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        got: float = node.value  # type: ignore[assignment]
    elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        got = SIGNS[type(node.op)](_value(node.left), _value(node.right))  # type: ignore[operator]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        got = -_value(node.operand)
    else:
        raise ValueError("allowed are numbers, + - * / // % and brackets")
    if abs(got) > MOST:
        raise ValueError(f"a number above {MOST:g}")
    return got


def database(path: Path, seconds: float = PATIENCE) -> Tool:
    """`sql SELECT ...` over a SQLite file that is opened for reading alone: nothing but SELECT passes, no other file
    can be attached, and what takes longer than `seconds` is interrupted."""

    def ask(text: str) -> str:
        at = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=seconds)
        try:
            at.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
            at.set_authorizer(lambda act, *_: sqlite3.SQLITE_OK if act in READS else sqlite3.SQLITE_DENY)
            ends = time.monotonic() + seconds
            at.set_progress_handler(lambda: time.monotonic() > ends, 1000)
            rows = at.execute(text).fetchmany(ROWS)
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise TimeoutError(f"the query did not end within {seconds:g} s") from None
            raise
        finally:
            at.close()
        return "; ".join(", ".join(str(v) for v in row) for row in rows) or "no row"

    return Tool("sql", "sql SELECT ...: rows of the local database", ask, ends=True)


def files(folder: Path) -> list[Tool]:
    """`files` lists a folder, `read NAME` reads one of its files, `note NAME TEXT` writes one; nothing outside of the
    folder can be named."""

    def inside(name: str) -> Path:
        path = (folder / name.strip()).resolve()
        if not name.strip() or not path.is_relative_to(folder.resolve()):
            raise PermissionError(f"{name[:40]!r} lies outside of the folder")
        return path

    def read(name: str) -> str:
        path = inside(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name[:40]!r}")
        with path.open("rb") as file:
            return file.read(LARGEST).decode(errors="replace")

    def note(text: str) -> str:
        name, _, said = text.strip().partition(" ")
        inside(name).write_text(said[:LARGEST])
        return f"{name} is written"

    listed: Callable[[str], str] = lambda _: " ".join(sorted(p.name for p in folder.iterdir())[:200])  # noqa: E731
    return [Tool("files", "files: the names of the local files", listed, ends=True),
            Tool("read", "read NAME: the text of a local file", read, ends=True),
            Tool("note", "note NAME TEXT: write a local file", note, ("write",), ends=True)]

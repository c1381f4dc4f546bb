"""A digest of the code that a run's figures depend on: comments, docstrings and what shows results do not count."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import fedllm
from fedllm.data.sources import resolve
from fedllm.methods.registry import source_of

HOUSE = Path(inspect.getfile(fedllm)).parent
ROOMS = ("core", "data", "engines", "evaluation", "local", "models", "selectors", "spaces", "tasks")
RUN = ("build", "course", "judge", "profiles", "recipe", "run", "views")
"""Files of runs/ that decide what a run computes."""


@functools.cache
def code_of(method: str) -> str:
    """Of the method's file, what methods share that it imports, and the rooms that carry out what it asks."""
    files = {*_with_shared(Path(source_of(method))), *_common()}
    return hashlib.sha256("".join(_bare(f) for f in sorted(files)).encode()).hexdigest()[:16]


@functools.cache
def _common() -> tuple[Path, ...]:
    rooms = [f for room in ROOMS for f in (HOUSE / room).glob("*.py")]
    return (*rooms, *(HOUSE / "local" / "objectives").glob("*.py"), *(HOUSE / "runs" / f"{n}.py" for n in RUN))


def _with_shared(file: Path) -> Iterator[Path]:
    """A method's file, and those of methods/_*.py that it imports, and they."""
    found, todo = set(), [file]
    while todo:
        at = todo.pop()
        found.add(at)
        names = {n.module for n in ast.walk(ast.parse(at.read_text())) if isinstance(n, ast.ImportFrom) and n.module}
        shared = [HOUSE / "methods" / f"{n.rpartition('.')[2]}.py" for n in names if n.startswith("fedllm.methods._")]
        todo += [f for f in shared if f not in found]
    yield from found


@functools.cache
def _bare(file: Path) -> str:
    """The file without comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
                                                      and isinstance(x.value.value, str))]
    return ast.dump(tree)


@functools.cache
def data_of(source: str) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(resolve(source).read_bytes()).hexdigest()[:16]

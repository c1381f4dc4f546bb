"""Finds the runs under some folders: runs, runs of stages, and the cells of comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.comparisons.compare import FILE as COMPARISON
from fedllm.core.errors import RunError
from fedllm.runs.folder import STAGES

DEEP, MOST = 4, 5000
"""Folders below a root that are looked into, and how many of them in one look."""
SIGNS = ("recipe.yaml", "events.jsonl", "checkpoints")
"""What makes a folder one of a run, whole or half written."""
USUAL = ("runs", "comparisons")


@dataclass(frozen=True)
class Place:
    """A folder of a run, or of runs that belong together."""

    id: str
    path: Path
    label: str
    kind: str
    """run, stages, comparison, or empty where it has no recipe."""
    within: str = ""
    """The id of the comparison or stages that it belongs to."""


def roots(given: Sequence[Path]) -> list[Path]:
    """The folders to look in, absolute; RunError for one that is not there."""
    found = list(given) or [p for name in USUAL if (p := Path(name)).is_dir()]
    if not found:
        raise RunError("there is neither runs/ nor comparisons/ here; name a folder of runs, as in `fedllm dashboard "
                       "path/to/runs`")
    for path in found:
        if not path.is_dir():
            raise RunError(f"{path} is no folder; `fedllm dashboard` wants a folder of runs, or one run's")
    return [path.resolve() for path in found]


def places(roots: Sequence[Path]) -> Iterator[Place]:
    """Every run under the roots, those of one comparison or of stages after it; links are not followed."""
    left = [MOST]
    for root in roots:
        yield from _below(root, root, "", DEEP, left)


def _below(path: Path, root: Path, within: str, deep: int, left: list[int]) -> Iterator[Place]:
    left[0] -= 1
    if left[0] < 0:
        return
    label = str(path.relative_to(root.parent))
    place = Place(hashlib.sha256(str(path).encode()).hexdigest()[:16], path, label, "", within)
    if (path / COMPARISON).is_file():
        yield Place(place.id, path, label, "comparison")
        yield from _inside(path, root, place.id, deep, left)
    elif (path / STAGES).is_dir():
        yield Place(place.id, path, label, "stages", within)
        yield from _inside(path / STAGES, root, place.id, 1, left)
    elif any((path / sign).exists() for sign in SIGNS):
        yield Place(place.id, path, label, "run" if (path / "recipe.yaml").is_file() else "", within)
    elif deep:
        yield from _inside(path, root, within, deep, left)


def _inside(path: Path, root: Path, within: str, deep: int, left: list[int]) -> Iterator[Place]:
    try:
        inner = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir() and not p.is_symlink())
    except OSError:
        return  # gone meanwhile, or closed to us
    for child in inner:
        yield from _below(child, root, within, deep - 1, left)

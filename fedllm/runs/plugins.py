"""Plugin files of a recipe: loaded in the place of earlier ones, and held to what they were when the run began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.found import Room, digest_of, plug
from fedllm.methods.registry import METHODS
from fedllm.runs.layers import LAYERS
from fedllm.selectors.registry import SELECTORS
from fedllm.spaces.registry import SPACES

ROOMS: Sequence[Room[Any]] = (METHODS, LAYERS, SPACES, SELECTORS)
"""What a plugin file may hold."""


def plugged(listed: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
    """Load these files (path, sha256 or None where none is known yet); each with its whole path and its digest.

    The plugins of a process are those of the recipe that was read last. A file that is not what it was is refused.
    """
    found = []
    for i, (file, known) in enumerate(listed):
        key, path = f"plugins.{i}.file", Path(file).expanduser().resolve()
        now = digest_of(path, key)
        if known not in (None, now):
            raise RecipeError(f"{key} = {file!r} has changed since the run began (sha256 {str(known)[:12]} then, "
                              f"{now[:12]} now); put the file back as it was, or begin a new run")
        if str(path) not in [f["file"] for f in found]:
            found.append({"file": str(path), "sha256": now})
    plug({f"plugins.{i}.file": f["file"] for i, f in enumerate(found)}, ROOMS)
    return found


def moved(listed: Sequence[tuple[str, str | None]], files: Sequence[str | Path]) -> list[tuple[str, str | None]]:
    """A run's own plugins (path, sha256) at other places: each of `files` stands for the one of the same name."""
    known = {Path(file).stem: (file, sha256) for file, sha256 in listed}
    for file in files:
        if Path(file).stem not in known:
            raise RecipeError(f"--plugin {str(file)!r}: this run goes on with the plugins that it began with "
                              f"({', '.join(known) or 'none'}); allowed is another place of one of these")
        known[Path(file).stem] = str(file), known[Path(file).stem][1]
    return list(known.values())

"""Whether what lies in a folder belongs to the comparison that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.runs.recipe import Recipe, read_recipe

FREE = ("versions", "plugins", "model.name", "data.labels")
"""What a run writes into its own recipe in another form than it was given."""
ELSEWHERE = "give --out another folder"


def not_as_asked(asked: Recipe, folder: Path) -> str:
    """Why the run in this folder is not one of this recipe; empty where it is."""
    for key, mine, its in differences(asked.model_dump(), read_recipe(folder / "recipe.yaml").model_dump()):
        if key.startswith(FREE) or (key == "rounds" and its == 0):  # a method that answers has no rounds
            continue
        return f"{folder} holds a run of another recipe ({key} = {its!r:.100} there, {mine!r:.100} here); {ELSEWHERE}"
    return ""


def same_comparison(kept: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """RunError where the folder's comparison is not this one, with other arms or more seeds."""
    for part in ("recipe", "overrides", "grid", "tuning"):
        for a, b in ((asked[part], kept.get(part)), (kept.get(part), asked[part])):
            for key, _, _ in differences(a, b, part):
                raise _another(folder, f"{key} is not the same")
    for name, setting in asked["settings"].items():
        old = kept["settings"].get(name, {"set": setting["set"], "arms": {}})
        if old["set"] != setting["set"]:
            raise _another(folder, f"its setting {name!r} changes other keys")
        for label, edits in setting["arms"].items():
            if old["arms"].get(label, edits) != edits:
                raise _another(folder, f"its {label!r} changes other keys")


def _another(folder: Path, why: str) -> RunError:
    return RunError(f"{folder} holds another comparison ({why}); {ELSEWHERE}")


def differences(mine: Any, its: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, what I say, what it says) wherever I say something else; what it says beside that is not looked at."""
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        for key, value in mine.items():
            at = f"{path}.{key}" if path else str(key)
            yield from differences(value, its.get(key), at)
    elif isinstance(mine, list | tuple) and isinstance(its, list | tuple) and len(mine) == len(its):
        for i, (a, b) in enumerate(zip(mine, its, strict=True)):
            yield from differences(a, b, f"{path}.{i}")
    elif mine != its:
        yield path, mine, its

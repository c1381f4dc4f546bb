"""A run's figures for trackers that were not there when it ran, or that failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedllm.core.errors import RunError
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import Recipe
from fedllm.runs.store import read_json
from fedllm.trackers.registry import installed
from fedllm.trackers.stream import replayed


def track(path: str | Path, names: Sequence[str]) -> list[str]:
    """Tell these trackers what of the run's record they have not been told; a sentence on each.

    Raises RecipeError for a tracker that is not there, RunError where one could not be told.
    """
    import yaml

    folder = RunFolder.open(Path(path))
    installed(names, "--to")
    with folder.held(name=".track"):
        recipe = yaml.safe_load((folder.path / "recipe.yaml").read_text())
        known = {name: field for name, field in recipe.items() if name in Recipe.model_fields}
        if trouble := replayed(folder.path, names, known, folder.events()):
            raise RunError("; ".join(trouble))
    told = {name: read_json(folder.path / "trackers" / f"{name}.json") for name in names}
    return [f"{name}: told up to round {max(at['told'].values(), default=0)} (run {at['id']})"
            for name, at in told.items()]

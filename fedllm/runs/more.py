"""Adds rounds to a run: it goes on as if its recipe had said so from the start, or is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedllm.core.errors import RecipeError
from fedllm.core.layer import name_of
from fedllm.runs.beside import FILE
from fedllm.runs.build import Parts, bound, make_layers
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.store import read_json, write_atomic


def grown(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The run's recipe with more rounds; RecipeError for any other change, or where its schedule knows its end."""
    if odd := [key for key in overrides if key != "rounds"]:
        raise RecipeError(f"{odd[0]}: a run that has begun keeps its recipe; allowed is rounds = a larger number")
    new = load_recipe(recipe, overrides)
    if new.rounds < recipe.rounds:
        raise RecipeError(f"rounds = {new.rounds}: the run has {recipe.rounds} rounds, and they can only become more")
    if new.rounds > recipe.rounds and (by := recipe.local.get("over_rounds", "constant")) != "constant":
        raise RecipeError(f"rounds = {new.rounds}: local.over_rounds = {by!r} has fallen towards the end after "
                          f"{recipe.rounds} rounds, so that a run of {new.rounds} would have gone another way from its "
                          "start; run the recipe anew")
    return new


def check_layers(old: Parts, new: Parts, folder: RunFolder) -> None:
    """RecipeError where a layer's noise or state hangs on how many rounds there are."""
    before = _layers(old)
    for was, now in zip(before, _layers(new), strict=True):
        if repr(vars(was)) != repr(vars(now)):
            raise RecipeError(f"rounds = {new.recipe.rounds}: layer '{name_of(was)}' was set for "
                              f"{old.recipe.rounds} rounds (its noise follows from them); run the recipe anew")
        if was.secrets and (folder.path / "result.json").exists():
            raise RecipeError(f"rounds = {new.recipe.rounds}: layer '{name_of(was)}' forgot its secrets when the "
                              "run ended, and cannot go on; run the recipe anew")


def _layers(parts: Parts) -> Sequence[Any]:
    rows = {c.id: c.n for c in parts.world.infos()}
    return bound(make_layers(parts.recipe)[0], parts.recipe, rows, parts.world.local)


def write_rounds(folder: RunFolder, rounds: int) -> None:
    """The run is no longer finished, and has so many rounds. Killed in between it is as it was, unfinished."""
    for name in ("result.json", FILE):  # baselines had as many rounds
        (folder.path / name).unlink(missing_ok=True)
    path = folder.path / "recipe.yaml"
    raw = yaml.safe_load(path.read_text()) | {"rounds": rounds}
    write_atomic(path, yaml.safe_dump(raw, sort_keys=False).encode())


def served(folder: RunFolder) -> tuple[int, dict[str, Any]] | None:
    """The checkpoint whose state a run serves: of the best round where that is kept, else the newest."""
    path = folder.path / "result.json"
    best = (read_json(path).get("best") if path.is_file() else None) or {}
    return folder.load(best["round"]) if best.get("kept") else folder.load()

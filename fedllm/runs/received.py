"""Recipes of runs' folders, which may have come from elsewhere: nothing that they name is run until somebody here says
that it may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.runs.plugins import moved
from fedllm.runs.recipe import Recipe, armed, read_recipe
from fedllm.runs.sections import Plugin
from fedllm.tasks.answers import CALL, listed


def received(folder: Path, trust_remote_code: bool = False, plugins: Sequence[str | Path] = ()) -> Recipe:
    """The recipe of a run's folder with its plugins loaded; RecipeError when it would run code on this machine, or send
    a key of it anywhere, and nobody here said that it may.

    `plugins` are the places of its plugin files here: who names them, trusts them (their digests are held to all the
    same).
    """
    recipe = read_recipe(folder / "recipe.yaml")
    if plugins:
        files = moved([(p.file, p.sha256) for p in recipe.plugins], plugins)
        recipe = recipe.model_copy(update={"plugins": [Plugin(file=f, sha256=s) for f, s in files]})
    return armed(trusted(recipe, folder, trust_remote_code, plugins))


def trusted(recipe: Recipe, folder: Path, trust_remote_code: bool = False,
            plugins: Sequence[str | Path] = ()) -> Recipe:
    """The recipe; RecipeError where it would run code and nobody here said that it may."""
    named = {str(file) for file in plugins}
    if (asks := list(wants(recipe, named))) and not trust_remote_code:
        raise RecipeError(f"{folder / 'recipe.yaml'} says {'; and '.join(asks)}; give --trust-remote-code if you trust "
                          "it")
    return recipe


def wants(recipe: Recipe, named: set[str]) -> Iterator[str]:
    """What running this recipe would do on this machine beside computing; plugin files that were `named` here aside."""
    if recipe.model.trust_remote_code:
        yield f"model.trust_remote_code = true, which runs Python code of {recipe.model.name!r} on this machine"
    for i, plugin in enumerate(recipe.plugins):
        if plugin.file not in named:
            yield (f"plugins.{i}.file = {plugin.file!r}, which is Python code that would run on this machine (--plugin "
                   "FILE says where it lies here, and that it may)")
    if isinstance(tools := recipe.data.environment and recipe.data.environment.mcp, list):
        yield f"data.environment.mcp = {tools}, a command that would be run on this machine"
    if recipe.data.environment and (tape := recipe.data.environment.record):
        yield f"data.environment.record = {tape!r}, a file of this machine that would be written"
    for name in (n for n in listed(recipe.evaluate.metric) if n.startswith(CALL)):
        yield (f"evaluate.metric = {name!r}, which calls a function of this machine with the model's "
               "text")
    for name, where in _keys({**recipe.model_dump(), "method": recipe.method.knobs}):
        yield f"api_key_env = {name!r}, which sends what that variable holds here to {where!r}"


def _keys(value: Any) -> Iterator[tuple[str, str]]:
    """Each environment variable whose value would be sent, and to what address."""
    if isinstance(value, Mapping):
        if name := value.get("api_key_env"):
            yield str(name), str(value.get("base_url") or value.get("endpoint"))
        for inner in value.values():
            yield from _keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _keys(inner)

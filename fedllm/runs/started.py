"""Begin a run of a recipe, or go on where a killed one stood."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError, RunError
from fedllm.runs.began import from_elsewhere
from fedllm.runs.build import Parts, build
from fedllm.runs.folder import RunFolder
from fedllm.runs.more import check_layers, grown, write_rounds
from fedllm.runs.progress import Quiet
from fedllm.runs.received import received
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.resolved import resolved
from fedllm.runs.result import Result, finished
from fedllm.runs.rows import look
from fedllm.runs.run import Run
from fedllm.runs.sections import OWN
from fedllm.runs.spread import spread
from fedllm.runs.standing import Publish
from fedllm.runs.terminal import progress_bars

log = logging.getLogger(__name__)


def begin(recipe: str | Path | Mapping[str, Any] | Recipe, root: str | Path, overrides: Mapping[str, Any],
          publish: Publish, shown: Quiet | None = None) -> Result:
    """A new run, from its first test to its end; `shown` in the place of bars or lines."""
    parts = build(load_recipe(recipe, overrides))
    look(parts)  # rows that cannot be read are refused before there is a folder
    folder = RunFolder.fresh(Path(root), parts.recipe.name, resolved(parts))
    say_name(folder, Path(root), parts.recipe.name)
    with folder.held(), spread(parts), contextlib.nullcontext(shown) if shown else progress_bars() as progress:
        return Run(parts, folder, progress, publish).go()


def say_name(folder: RunFolder, root: Path, name: str) -> None:
    """A run whose name was taken has another folder."""
    if folder.path.name != name:
        log.warning("%s is there already; this run goes to %s", root / name, folder.path)


def go_on(path: str | Path, publish: Publish, *, plugins: Sequence[str | Path] = (), trust_remote_code: bool = False,
          overrides: Mapping[str, Any] | None = None, shown: Quiet | None = None) -> Result:
    """A run that was stopped at any moment, to its end; `plugins` are the places of the plugin files that it has, and
    other code that it names runs only if it is trusted. `overrides` may hold more `rounds`, and nothing else."""
    folder = RunFolder.open(Path(path))
    if (folder.path / "result.json").exists() and not overrides:
        return finished(folder.path)
    recipe = received(folder.path, plugins=plugins, trust_remote_code=trust_remote_code)
    more = grown(recipe, overrides or {})
    if recipe.data.source == OWN or folder.at_sites:
        raise RunError(f"{path} is a run of a real federation: "
                       f"`fedllm serve {path} --federation FOLDER` goes on with it")
    with folder.held():
        if more.rounds == recipe.rounds and (folder.path / "result.json").exists():
            return finished(folder.path)
        try:
            parts = build(recipe)
        except DataError as error:
            raise from_elsewhere(folder, error) from None
        if more.rounds > recipe.rounds:
            longer = build(more)
            check_layers(parts, longer, folder)
            write_rounds(folder, more.rounds)
            parts = longer
        return _go_on(parts, folder, publish, recipe.rounds if more.rounds > recipe.rounds else None, shown)


def _go_on(parts: Parts, folder: RunFolder, publish: Publish, ended: int | None, shown: Quiet | None) -> Result:
    with spread(parts), contextlib.nullcontext(shown) if shown else progress_bars() as progress:
        return Run(parts, folder, progress, publish).go(ended)

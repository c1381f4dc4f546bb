"""The coordinator's side: `serve` runs a recipe with the sites that have joined, over the transport of their keys."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.engines.far.line import Patience
from fedllm.federation import operate
from fedllm.federation.answering import Desk
from fedllm.federation.coordinator import check_recipe, recipe_run
from fedllm.federation.process import no_proxy
from fedllm.runs.asking import need_answers
from fedllm.runs.audit_key import AUDIT_KEY, make_key
from fedllm.runs.folder import RunFolder, fresh_path
from fedllm.runs.follow import following
from fedllm.runs.progress import Lines
from fedllm.runs.received import received
from fedllm.runs.recipe import Recipe, of_sites
from fedllm.runs.resolved import versions
from fedllm.runs.result import Result, finished
from fedllm.runs.signature import sign


def serve(recipe: str | Path | Mapping[str, Any] | Recipe, federation: str | Path, *, root: str | Path = "runs",
          needed: int | None = None, wait: float = 600.0, patience: Patience | None = None,
          metrics: int | None = None, desk: Desk | None = None, **overrides: Any) -> Result:
    """Run a recipe in a real federation and come back with its result.

    `federation` is the folder made by `fedllm keys new`; `needed` sites (all of them by default) must have joined
    within `wait` seconds; `metrics` is a port of this machine for Prometheus. At `desk` questions are answered after
    the rounds, until the process is stopped. Raises RecipeError before anything starts and RunError when the run cannot
    go on.
    """
    checked = of_sites(recipe, overrides)
    check_recipe(checked)
    if desk is not None:
        may_answer(checked)
    folder = RunFolder.create(fresh_path(Path(root), checked.name),
                              {**checked.model_dump(mode="json"), "versions": versions()})
    recipe_run(folder.path)
    return resume_serving(folder.path, federation, needed=needed, wait=wait, patience=patience, metrics=metrics,
                          desk=desk, trust_remote_code=True)  # the recipe is the caller's own


def resume_serving(run: str | Path, federation: str | Path, *, needed: int | None = None, wait: float = 600.0,
                   patience: Patience | None = None, metrics: int | None = None, desk: Desk | None = None,
                   trust_remote_code: bool = False) -> Result:
    """Go on with a federation's run, whatever was killed; it ends in the state of an undisturbed run, and its record is
    signed with the federation's key. A folder whose recipe runs a model's own code is refused unless that is trusted.
    """
    room = RunFolder.open(Path(run).resolve())
    if (room.path / "result.json").exists() and desk is None:
        return finished(room.path)
    shown: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    recipe = received(room.path, trust_remote_code=trust_remote_code)
    if desk is not None:
        may_answer(recipe)
    if recipe.engine.kind == "flower":
        from fedllm.federation.flower.serve import serve_folder
    elif recipe.engine.kind == "academy":
        from fedllm.federation.academy.serve import serve_folder
    else:
        from fedllm.federation.nvflare.serve import serve_folder

        shown = following(room.path, Lines())  # a process of NVFlare's drives the run
    figures = contextlib.nullcontext() if metrics is None else operate.metrics(room.path, metrics)
    keys = Path(federation).resolve()
    with operate.announced(room.path), figures, no_proxy(), shown:
        more = {} if desk is None else {"desk": desk}
        result = serve_folder(room.path, keys, needed, wait, patience, **more)
        sign(room.path, keys / AUDIT_KEY if (keys / AUDIT_KEY).exists() else make_key(keys))
        return result


def may_answer(recipe: Recipe) -> None:
    """RecipeError where no questions can be put to this run's sites."""
    need_answers(recipe)
    if recipe.engine.kind == "flower":
        raise RecipeError("--ask: questions are answered over NVFlare and Academy, and engine.kind is 'flower'; use "
                          "keys of `fedllm keys new --engine flare`")

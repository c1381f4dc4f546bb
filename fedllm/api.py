"""What `import fedllm` runs: a recipe from its first test to its report, or on from where it was killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.report.report import publish
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result
from fedllm.runs.run import begin, go_on

RUNS = Path("runs")


def run(recipe: str | Path | Mapping[str, Any] | Recipe, *, root: str | Path = RUNS, **overrides: Any) -> Result:
    """Run a recipe (a path, a mapping or a `Recipe`) and come back with its `Result`.

    `overrides` are keys of the recipe (`rounds=3`, `local={"lr": 1e-3}`, or `**{"local.lr": 1e-3}`). The run's folder
    is made under `root`. Raises RecipeError, DataError, ModelError or CompositionError before any work is done,
    ClientError when a client's code fails, and RunError when the run cannot go on; `resume` then takes it up.
    """
    return begin(recipe, root, overrides, publish)


def resume(path: str | Path, trust_remote_code: bool = False) -> Result:
    """Go on with a run that was stopped at any moment; it ends as if it had never stopped.

    A folder whose recipe runs code that comes with its model is refused unless that code is trusted.
    """
    return go_on(path, publish, trust_remote_code)

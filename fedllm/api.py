"""What `import fedllm` runs: a recipe from its first test to its report, or on from where it was killed; `ask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.report.report import publish
from fedllm.runs.asking import PATIENCE, Answered, Session, check_question
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result
from fedllm.runs.stages import begin, go_on

RUNS = Path("runs")


def run(recipe: str | Path | Mapping[str, Any] | Recipe, *, root: str | Path = RUNS, **overrides: Any) -> Result:
    """Run a recipe (a path, a mapping or a `Recipe`) and come back with its `Result`.

    `overrides` are keys of the recipe (`rounds=3`, `local={"lr": 1e-3}`, or `**{"local.lr": 1e-3}`); `plugins=[FILE]`
    adds files with parts of one's own. A recipe of `stages` comes back with its last one's. The run's folder is made
    under `root`. Raises RecipeError, DataError, ModelError or CompositionError before any work is done, ClientError
    when a client's code fails, and RunError when the run cannot go on; `resume` then takes it up.
    """
    return begin(recipe, root, overrides, publish)


def ask(source: str | Path | Mapping[str, Any] | Recipe, *questions: str, timeout: float = PATIENCE,
        trust_remote_code: bool = False, **overrides: Any) -> list[Answered]:
    """Put questions to the answering method of a run (its folder) or of a recipe, whose rounds are gone through first.

    Each `Answered` names the clients that it rests on, and what it cost on the wire. `timeout` is in seconds, for each
    question. Nothing is written; code that a run's folder names runs only if it is trusted. Raises RecipeError for a
    method that answers no questions, RunError when time is up.
    """
    for question in questions:
        check_question(question)
    session = Session(source, overrides, timeout, trust_remote_code)
    return [session.ask(question) for question in questions]


def resume(path: str | Path, *, plugins: Sequence[str | Path] = (), trust_remote_code: bool = False,
           **overrides: Any) -> Result:
    """Go on with a run that was stopped at any moment; it ends as if it had never stopped.

    `rounds=N` gives it more rounds, finished or not: it ends as one that had so many from the start, and is refused
    where its schedule or its privacy depends on their number.

    A folder whose recipe runs code (of its model, of plugin files, of a metric) is refused unless that is trusted;
    `plugins` says where the plugin files that the run began with lie here, which is to trust them.
    """
    return go_on(path, publish, plugins=plugins, trust_remote_code=trust_remote_code, overrides=overrides)

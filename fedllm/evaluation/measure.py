"""`fedllm evaluate`: rows of one's own, or lm-eval's tasks, on a finished run; what was found is kept in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.evaluation.rows import Evaluated, evaluate_rows
from fedllm.evaluation.trained import Trained, log


def on_rows(path: str | Path, data: str | None, metric: Sequence[str] | None = None, *, limit: int | None = None,
            max_new_tokens: int | None = None, name: str | None = None, trust_remote_code: bool = False
            ) -> tuple[Evaluated, Path]:
    """The figures before and after the run on these rows, and the file that keeps them."""
    run = Trained(path, trust_remote_code)
    found = evaluate_rows(run, data, metric, limit, max_new_tokens)
    return found, run.keep(name or (Path(data).stem if data else "test"), found.as_json())


def on_tasks(path: str | Path, tasks: Sequence[str], *, base: bool = True, shots: int | None = None,
             limit: int | None = None, chat: bool | None = None, name: str | None = None,
             trust_remote_code: bool = False) -> tuple[dict[str, Any], Path]:
    """lm-eval's figures of the run's model (`base`: of the one that it began with too), and the file that keeps them.

    `chat` None: as the run was trained. RecipeError where lm-eval is not installed or a task cannot be run.
    """
    try:
        from fedllm.evaluation.harness import run_tasks
    except ImportError as error:
        raise RecipeError(f"--tasks needs the package lm-eval ('{error.name}' is not there); pip install "
                          "'fedlm[evaluate]'") from None
    run = Trained(path, trust_remote_code)
    talks = run.recipe.data.template == "chat" if chat is None else chat
    found: dict[str, Any] = {"kind": "lm-eval", "tasks": list(tasks), "chat_template": talks, "limit": limit}
    for arm in (("before", "after") if base else ("after",)):
        log.info("lm-eval: %s on the model %s the run", ", ".join(tasks), arm)
        found[arm] = run_tasks(run.before if arm == "before" else run.after, tasks, shots=shots, limit=limit,
                               chat=talks, seed=run.recipe.seed)
    return found, run.keep(name or "+".join(Path(t).stem for t in tasks), found)

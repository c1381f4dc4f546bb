"""`fedllm evaluate`: a finished run's model on rows of one's own, or on lm-eval's tasks, beside the model before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.said import Json, put
from fedllm.core.errors import RecipeError

if TYPE_CHECKING:
    from fedllm.evaluation.rows import Evaluated

out = Console()


def evaluate(path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
             tasks: Annotated[list[str] | None, typer.Option("--tasks", show_default=False, help=(
                 "Task of lm-eval, or a task file of your own (.yaml); repeat, or separate by commas."))] = None,
             data: Annotated[str | None, typer.Option("--data", show_default=False, help=(
                 "File of rows, read as the recipe says; without it and --tasks the recipe's global test."))] = None,
             metric: Annotated[list[str] | None, typer.Option("--metric", show_default=False, help=(
                 "exact, last_number, choice, rouge or call:module:function (repeat); default: the recipe's."))] = None,
             limit: Annotated[int | None, typer.Option(min=1, help="Most rows (of each task).")] = None,
             shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question (--tasks).")] = None,
             base: Annotated[bool, typer.Option("--base/--no-base", help="The model before the run too (--tasks).")
                             ] = True,
             chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help=(
                 "Ask by the chat template (--tasks); default: as the run was trained."))] = None,
             max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer (--data); default: the "
                                                                            "recipe's.")] = None,
             name: Annotated[str | None, typer.Option(help="Name of the file under evaluations/.")] = None,
             trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes "
                                                             "with the run's model.")] = False,
             as_json: Json = False) -> None:
    """Measure a finished run: [bold]fedllm evaluate runs/demo --data new.jsonl --metric rouge[/bold], or --tasks FILE.

    Everything is kept in the run's folder, under evaluations/.
    """
    from fedllm.evaluation.measure import on_rows, on_tasks

    if data is not None and not data.strip():
        raise RecipeError(f"--data = {data!r}: a path is not empty; without --data it is the recipe's own test")
    if tasks and (data or metric or max_new_tokens):
        raise RecipeError("--tasks and --data (with --metric, --max-new-tokens) are two measurements; ask for one")
    if not tasks and (shots is not None or chat is not None or not base):
        raise RecipeError("--shots, --chat and --no-base go with --tasks; rows are read as the recipe says, and always "
                          "tested before and after")
    if tasks:
        named = [t for text in tasks for t in text.split(",") if t]
        told, at = on_tasks(path, named, base=base, shots=shots, limit=limit, chat=chat, name=name,
                            trust_remote_code=trust_remote_code)
        _show(told if as_json else task_table(told), at, as_json)
        return
    found, at = on_rows(path, data, metric, limit=limit, max_new_tokens=max_new_tokens, name=name,
                        trust_remote_code=trust_remote_code)
    brief = {k: v for k, v in found.as_json().items() if k != "rows"}
    _show(brief if as_json else row_table(found), at, as_json)


def _show(what: Any, at: Path, as_json: bool) -> None:
    if as_json:
        put({**what, "file": str(at)})
    else:
        out.print(what)
        out.print(f"[dim]kept in[/dim] {at}", highlight=False, soft_wrap=True)


def row_table(found: Evaluated) -> Table:
    """Each figure before and after, and the interval of the difference."""
    from fedllm.report.facts import is_share, label, number

    table = Table(title=f"{found.n} rows of {found.data}", title_justify="left", title_style="bold")
    for column in ("", "before", "after", "difference", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, c in found.metrics.items():
        scale, digits = (100, 1) if is_share(name) else (1, 3)
        d, low, high = (f"{scale * v:+.{digits}f}" for v in (c.difference, c.low, c.high))
        table.add_row(label(name), number(c.before, name), number(c.after, name), d, f"{low} to {high}")
    return table


def task_table(found: Mapping[str, Any]) -> Table:
    """lm-eval's figures with their standard errors, before and after."""
    arms = [a for a in ("before", "after") if a in found]
    table = Table(title="lm-eval", title_justify="left", title_style="bold")
    for column in ("task", "metric", "rows", *arms):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, figures in found["after"]["results"].items():
        rows = found["after"]["n-samples"].get(task, {}).get("effective", "")
        for name in figures:
            metric, _, way = name.partition(",")
            if not isinstance(figures[name], int | float) or metric.endswith("_stderr") or name == "sample_len":
                continue
            cells = [_with_error(found[a]["results"].get(task, {}), metric, way) for a in arms]
            table.add_row(task, f"{metric}{f' ({way})' if way not in ('', 'none') else ''}", str(rows), *cells)
    return table


def _with_error(figures: Mapping[str, Any], metric: str, way: str) -> str:
    value, error = (figures.get(f"{m},{way}" if way else m) for m in (metric, f"{metric}_stderr"))
    said = f"{value:.4f}" if isinstance(value, int | float) else "-"
    return said + (f" ± {error:.4f}" if isinstance(error, int | float) else "")

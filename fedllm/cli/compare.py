"""`fedllm compare`: one recipe under several methods and settings, or a recipe family, over seeds."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedllm.cli.guard import stopped
from fedllm.core.errors import RecipeError, RunFailed

if TYPE_CHECKING:
    from fedllm.comparisons.compare import Tell
    from fedllm.comparisons.told import Comparison

out, err = Console(), Console(stderr=True)
log = logging.getLogger("fedllm.progress")
WIDE = 160
"""Columns of a terminal from which a table stands whole; below, what arms cost is a table of its own."""


def compare(recipe: Annotated[Path, typer.Argument(metavar="RECIPE|FAMILY", help="A recipe or a recipe family in YAML.",
                                                   show_default=False)],
            overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False,
                                                                  help="Keys of the recipe to change.")] = None,
            methods: Annotated[str | None, typer.Option("--methods", metavar="ID,ID,...", show_default=False, help=(
                "Methods to compare; local_only and centralized are two of them. Default: the recipe's own."))] = None,
            vary: Annotated[list[str] | None, typer.Option("--vary", metavar="KEY=V,V,...", show_default=False, help=(
                "Values of a key to compare, as in space.name=lora,ia3 (repeat: every combination)."))] = None,
            grid: Annotated[list[str] | None, typer.Option("--grid", metavar="KEY=V,V,...", show_default=False, help=(
                "Values of which each arm gets its best, on seeds that are not measured (repeat)."))] = None,
            seeds: Annotated[str | None, typer.Option("--seeds", metavar="N|S,S,...", show_default=False, help=(
                "How many seeds from the recipe's on, or which. Default: 8, or the family's; fewer than 6 can show no "
                "difference."))] = None,
            tuning_seeds: Annotated[int, typer.Option(help="Seeds, from 1000 on, on which --grid chooses.")] = 2,
            baseline: Annotated[str | None, typer.Option("--baseline", metavar="ARM", show_default=False, help=(
                "What the others are held against. Default: the first."))] = None,
            set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", show_default=False, help=(
                "As KEY.PATH=VALUE after the recipe (repeat)."))] = None,
            real: Annotated[bool, typer.Option("--real", help="A family's run on the real model that it names.")
                            ] = False,
            jobs: Annotated[int, typer.Option(help="Cells that run at once, each in a process of its own.")] = 1,
            plugin: Annotated[list[Path] | None, typer.Option("--plugin", metavar="FILE", show_default=False, help=(
                "Python file with a method, layer, space or selector of your own (repeat)."))] = None,
            to: Annotated[Path | None, typer.Option("--out", show_default=False, help=(
                "Folder of the comparison. Default: comparisons/NAME."))] = None,
            as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line: progress, then the "
                                                                 "comparison.")] = False) -> None:
    """Compare methods on a recipe: [bold]fedllm compare recipe.yaml --methods fedavg,fedprox --seeds 8[/bold].

    Every cell is an ordinary run folder; what is finished is not run again.
    """
    from fedllm.comparisons.axes import axes
    from fedllm.comparisons.compare import ROOT
    from fedllm.comparisons.compare import compare as go
    from fedllm.runs.complaints import parse_override

    changes: dict[str, Any] = dict(parse_override(text) for text in [*(set_ or ()), *(overrides or ())])
    if plugin:
        changes["plugins"] = [str(file) for file in plugin]
    with stopped(f"what is finished is kept in {to or ROOT}; the same command goes on"), _display(as_json) as tell:
        found = go(recipe, methods=_methods(methods), vary=axes(vary or (), "--vary"),
                   grid=axes(grid, "--grid") if grid else None, seeds=_seeds(seeds), baseline=baseline,
                   tuning_seeds=tuning_seeds, overrides=changes, real=real, jobs=jobs, out=to, tell=tell)
        tell("comparison", {"folder": str(found.folder), **found.as_json()})
    if not as_json:
        show(found)
    if found.failed:
        raise RunFailed("cells without a figure: " + "; ".join(found.failed)[:2000])


def _methods(text: str | None) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if text is not None and not all(names):
        raise RecipeError(f"--methods {text!r}: allowed are ids of methods with commas between them")
    return names


def _seeds(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {text!r}: allowed is a number of seeds from 1 up, or a list as 0,1,2") from None
    return numbers if "," in text else numbers[0]


@contextlib.contextmanager
def _display(as_json: bool) -> Iterator[Tell]:
    """A bar on a terminal, lines elsewhere, JSON where it is asked for."""
    if as_json:
        from fedllm.runs.progress import JsonLines

        lines = JsonLines(sys.stdout)
        yield lambda what, facts: lines.put(what, **facts)
    elif not err.is_terminal:
        yield lambda what, facts: log.info("%s", _line(what, facts)) if _line(what, facts) else None
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=err, transient=True) as bars:
            yield _Bar(bars).tell


class _Bar:
    """One bar for each stage: checking, then cells."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task = bars.add_task("checking", total=None, note="")

    def tell(self, what: str, facts: Mapping[str, Any]) -> None:
        if what in ("checking", "cells"):
            self.bars.reset(self.task, total=facts["cells"], completed=facts.get("done", 0), description=what, note="")
        elif what in ("checked", "cell"):
            self.bars.update(self.task, advance=1, note=escape(_line(what, facts)))


def _line(what: str, facts: Mapping[str, Any]) -> str:
    """What a log says of it."""
    arm = " ".join(filter(None, (str(facts.get("setting", "")), str(facts.get("arm", "")))))
    if what == "cells":
        return f"{facts['cells']} cells, {facts['done']} of them finished before"
    if what == "cell":
        return f"{arm}, seed {facts['seed']}: {facts.get('error', 'done')}"
    return f"{arm} is checked" if what == "checked" and "error" not in facts else ""


def _print_table(title: str, lines: Sequence[Sequence[str]], baseline: str) -> None:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for i, name in enumerate(lines[0]):
        table.add_column(escape(name.replace(", ", ",\n")), justify="right" if i else "left", overflow="fold")
    for line in lines[1:]:
        style = "bold green" if line[0] == baseline else ""
        table.add_row(*(escape(x.replace(" (", "\n(").replace("), ", ")\n")) for x in line), style=style)
    out.print(table)


def show(found: Comparison) -> None:
    """The tables, the sentence of each, what to mind, and where everything lies."""
    from fedllm.comparisons.page import COSTS, failures, grid_of, rates_said, seeds_said

    for told in found.tables:
        lines, costs = grid_of(told), len(COSTS)
        title = told.setting or found.card.get("title", found.name)
        if out.width >= WIDE:
            _print_table(title, lines, told.baseline)
        else:
            _print_table(title, [line[:-costs] for line in lines], told.baseline)
            _print_table("what it costs", [[line[0], *line[-costs:]] for line in lines], told.baseline)
        out.print(f"[bold]{escape(told.says)}[/bold]", highlight=False)
        for text in filter(None, (rates_said(told), *failures(told))):
            out.print(escape(text), highlight=False)
    out.print(f"[dim]{escape(seeds_said(found))}[/dim]", highlight=False)
    for why in found.cautions:
        out.print(f"[yellow]mind[/]    {escape(why)}", highlight=False)
    out.print(f"report  {found.folder / 'report.html'}\ntable   {found.folder / 'comparison.md'}", markup=False,
              highlight=False, soft_wrap=True)

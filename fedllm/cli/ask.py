"""`fedllm ask`: questions to a method that answers them, and whom each answer rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedllm.cli.said import Json, put
from fedllm.cli.typed import lines

if TYPE_CHECKING:
    from fedllm.runs.asking import Answered

out = Console()
PATIENCE = 300.0
"""Seconds that one question, or all rounds before the first, may take."""


def ask(source: Annotated[Path, typer.Argument(metavar="RUN_OR_RECIPE", show_default=False,
                                               help="A run's folder, or a recipe (its rounds come first).")],
        questions: Annotated[list[str] | None, typer.Argument(metavar="[QUESTION]...", show_default=False,
                                                              help="Without any: one from each line typed.")] = None,
        change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE",
                                                         help="A key of the recipe to change.")] = None,
        timeout: Annotated[float, typer.Option(help="Seconds that one question may take.")] = PATIENCE,
        trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a run's recipe "
                                                        "names.")] = False,
        as_json: Json = False) -> None:
    """Ask a method that answers questions: [bold]fedllm ask recipes/rag.yaml "Who signs an invoice?"[/bold]."""
    from fedllm.runs.asking import Session  # heavy, as the whole of a run is
    from fedllm.runs.complaints import parse_override

    session = Session(source, dict(parse_override(text) for text in change or ()), timeout,
                      trust_remote_code)
    for question in questions or lines():
        show(session.ask(question), as_json)


def show(got: Answered, as_json: bool) -> None:
    """The answer, whom it rests on, and what it cost."""
    from fedllm.report.facts import duration
    from fedllm.runs.progress import size

    if as_json:
        return put(got.as_json())
    out.print(f"[cyan]{escape(got.question)}[/cyan]", soft_wrap=True)
    out.print(escape(got.answer) if got.answer else "(no answer: nobody had anything to say)", soft_wrap=True)
    rests = f"rests on {', '.join(got.clients)}" if got.clients else "rests on no client"
    silent = "".join(f"; missing {c} ({why})" for c, why in got.missing.items())
    cost = f"{size(got.bytes['up'])} up, {size(got.bytes['down'])} down, {duration(got.seconds)}"
    out.print(f"[dim]{escape(rests + silent)}; {cost}[/dim]", soft_wrap=True)

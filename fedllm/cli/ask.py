"""`fedllm ask`: questions to a method that answers them, and whom each answer rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedllm.cli.guard import stopped
from fedllm.cli.said import Json, printable, put
from fedllm.cli.typed import lines
from fedllm.core.errors import RecipeError

if TYPE_CHECKING:
    from fedllm.runs.asking import Answered

out = Console()
PATIENCE = 300.0
"""Seconds that one question, or all rounds before the first, may take."""


def ask(source: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE_OR_URL", show_default=False,
                                              help="A run's folder, a recipe (its rounds come first), or where `fedllm "
                                              "serve --ask` takes questions (http://...).")],
        questions: Annotated[list[str] | None, typer.Argument(metavar="[QUESTION]...", show_default=False,
                                                              help="Without any: one from each line typed.")] = None,
        change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE",
                                                         help="A key of the recipe to change.")] = None,
        timeout: Annotated[float, typer.Option(help="Seconds that one question may take.")] = PATIENCE,
        trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a run's recipe "
                                                        "names.")] = False,
        as_json: Json = False,
        key_env: Annotated[str | None, typer.Option(help="With a URL: environment variable with the key.")] = None
        ) -> None:
    """Ask a method that answers questions: [bold]fedllm ask rag.yaml "Who signs an invoice?"[/bold]."""
    from fedllm.runs.asked_far import FarSession
    from fedllm.runs.asking import Session  # heavy, as the whole of a run is
    from fedllm.runs.complaints import parse_override

    far = source.startswith(("http://", "https://"))
    if (far and change) or (key_env and not far):
        raise RecipeError("--set is for a recipe, and --key-env for a URL: "
                          f"{source!r} is {'a URL' if far else 'none'}; leave it out")
    with stopped("a question that was under way has no answer, and nothing was to be kept"):
        session = FarSession(source, timeout, key_env) if far else Session(
            Path(source), dict(parse_override(text) for text in change or ()), timeout, trust_remote_code)
        for question in questions or lines():
            show(session.ask(question), as_json)


def show(got: Answered, as_json: bool) -> None:
    """The answer, whom it rests on, and what it cost."""
    from fedllm.report.facts import duration
    from fedllm.runs.progress import size

    if as_json:
        return put(got.as_json())
    out.print(f"[cyan]{escape(got.question)}[/cyan]", soft_wrap=True)
    said = escape(printable(got.answer)) if got.answer else "(no answer: nobody had anything to say)"
    out.print(said, soft_wrap=True)
    cited = set(got.said.get("cited", ()))
    for n, p in enumerate(got.said.get("passages", ()), 1):
        held = p["text"] if p.get("text") else "(its text stays there)"
        says = f"[{n}] {', '.join(p['clients'])}: {p['id']}: {' '.join(held.split())}"
        out.print(escape(printable(says)[:240]), style="" if n in cited else "dim", soft_wrap=True)
    rests = f"rests on {', '.join(got.clients)}" if got.clients else "rests on no client"
    silent = "".join(f"; missing {c} ({why})" for c, why in got.missing.items())
    cost = f"{size(got.bytes['up'])} up, {size(got.bytes['down'])} down, {duration(got.seconds)}"
    out.print(f"[dim]{escape(rests + silent)}; {cost}[/dim]", soft_wrap=True)

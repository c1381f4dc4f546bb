"""`fedllm advise`: methods that fit a recipe, with the leaderboard's rows behind each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedllm.cli.said import Json, put
from fedllm.core.errors import RecipeError

if TYPE_CHECKING:
    from fedllm.advice.advise import Advice

out = Console()
BEFORE = 3
"""Methods that were passed over and are said."""
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def advise(recipe: Annotated[Path, typer.Argument(help="A recipe in YAML; its method does not matter.",
                                                  show_default=False)],
           overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False,
                                                                 help="Keys of the recipe to change.")] = None,
           personal: Annotated[bool, typer.Option("--personal", help="Each client shall end with a model of its own."
                                                  )] = False,
           stateless: Annotated[bool, typer.Option("--stateless", help="Clients keep nothing between rounds.")] = False,
           zeroth_order: Annotated[bool, typer.Option("--zeroth-order", help="Clients take no gradients.")] = False,
           limit: Annotated[str | None, typer.Option("--bytes", metavar="SIZE", show_default=False, help=(
               "Most bytes of a run, up and down over all clients, as in 20MB."))] = None,
           as_json: Json = False) -> None:
    """Name two or three methods that fit a recipe, and why: [bold]fedllm advise recipe.yaml[/bold].

    Loads rows and model, and trains nothing.
    """
    from fedllm.advice.advise import Wants
    from fedllm.advice.advise import advise as go
    from fedllm.runs.complaints import parse_override

    wants = Wants(personal, stateless, zeroth_order, _bytes(limit))
    found = go(recipe, wants, dict(parse_override(text) for text in overrides or ()))
    if as_json:
        put(found.as_json())
    else:
        show(found)


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kMG]?)B?", text.strip())
    if not match or not float(match[1]):
        raise RecipeError(f"--bytes {text!r}: allowed is a size above 0, as in 500kB, 20MB or 1.5GB")
    return float(match[1]) * UNITS[match[2]]


def show(found: Advice) -> None:
    """Each method with its reasons and rows, and what to do next."""
    from fedllm.cli.tables import size
    from fedllm.report.facts import duration, number

    def say(text: str) -> None:
        out.print(text, highlight=False, soft_wrap=True)

    say(f"[dim]{escape(found.recipe)}: {escape(', '.join(found.says))}[/dim]")
    for told in found.methods:
        about = "" if told.bytes is None else f", about {size(told.bytes)} a run of this recipe"
        say(f"[bold green]{told.method}[/]  {escape(told.title)}{about}")
        for reason in told.reasons:
            say(f"  - {escape(reason)}")
        for row in told.rows:
            say(f"  [dim]{escape(_line(row, number, size, duration))}[/dim]")
    for method, why in list(found.passed_over.items())[:BEFORE]:
        say(f"[dim]passed over: {method} ({escape(why)})[/dim]")
    of_rows = "A place is of few seeds on small worlds. " if any(told.rows for told in found.methods) else ""
    say(f"{of_rows}What holds on your rows:")
    out.print(found.then, highlight=False, markup=False, soft_wrap=True)


def _line(r: Any, number: Any, size: Any, duration: Any) -> str:
    """A row of the leaderboard."""
    mean, low, high = r.get("personal") or r["global"]
    half = "" if low is None else f" ± {(high - low) / 2 * (100 if r['metric'] == 'accuracy' else 1):.2g}"
    costs = ((r["up"], size, "up"), (r["down"], size, "down"), (r["cpu_seconds"], duration, "of one core"),
             (r["memory"], size, "of memory"))
    said = [f"{form(value)} {word}" for value, form, word in costs if value is not None]
    energy = [f"about {r['joules']:.0f} J by estimate"] if r["joules"] is not None else []
    return f"{r['world']}: {r['metric']} {number(mean, r['metric'])}{half} ({r['seeds']} seeds); " + ", ".join(
        [*said, *energy])

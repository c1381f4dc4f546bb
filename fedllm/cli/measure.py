"""Commands that measure, in a checkout of the project: `fedllm bench` and `fedllm claims`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fedllm.core.errors import RecipeError


def bench(context: typer.Context) -> None:
    """Measure speed and memory against what others run: [bold]fedllm bench simulation[/bold]."""
    _tool("bench", context.args)


def claims(context: typer.Context) -> None:
    """Run the claim of every method's card, and write docs/results/claims.json."""
    _tool("claims", context.args)


def _tool(name: str, args: list[str]) -> None:
    """Run a tool with a command line of its own."""
    import importlib

    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "evidence" / "__init__.py").is_file():
        raise RecipeError(f"`fedllm {name}` measures in a checkout of the project, and this is an installed package "
                          "without the folder evidence/; clone the project and run it there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        tool = importlib.import_module(f"evidence.{name}")
    except ImportError as error:
        raise RecipeError(f"`fedllm {name}` lacks the package '{error.name}'; pip install 'fedlm[bench]'") from None
    sys.argv = [f"fedllm {name}", *args]
    if code := tool.main():
        raise typer.Exit(code)

"""`fedllm judge`: two runs' answers compared by a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.said import Json, put
from fedllm.core.errors import RecipeError

if TYPE_CHECKING:
    from fedllm.evaluation.duel import Duel

out = Console()
OPTIONS = {"base_url": "--endpoint", "model": "--model", "api_key_env": "--key-env", "timeout": "--timeout",
           "parallel": "--parallel"}
"""Knobs of an endpoint, and the options that set them here."""


def judge(a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder.", show_default=False)],
          b: Annotated[Path, typer.Argument(metavar="RUN_B|base", show_default=False, help=(
              "Another run's folder, or `base`: the model that the first began with."))],
          data: Annotated[str, typer.Option("--data", help="File of questions.", show_default=False)],
          endpoint: Annotated[str, typer.Option("--endpoint", help="Address of the judge, up to and with the version.",
                                                show_default=False)],
          model: Annotated[str, typer.Option("--model", help="The judge's name there.", show_default=False)],
          key_env: Annotated[str | None, typer.Option("--key-env", show_default=False, help=(
              "NAME of the environment variable that holds its key."))] = None,
          timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 120.0,
          parallel: Annotated[int, typer.Option(help="Calls under way at once.")] = 4,
          limit: Annotated[int | None, typer.Option(min=1, help="Most questions.")] = None,
          max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the recipes'.")
                                    ] = None,
          verdict_tokens: Annotated[int, typer.Option(min=4, help="Tokens that the judge may say, reasons included.")
                                    ] = 512,
          price: Annotated[str | None, typer.Option("--price", metavar="READ:SAID", show_default=False, help=(
              "Prices of a million tokens, as in 2.5:10, to tell what the judge cost."))] = None,
          name: Annotated[str | None, typer.Option(help="Name of the file under RUN_A/evaluations/.")] = None,
          trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with "
                                                          "a run's model.")] = False,
          as_json: Json = False) -> None:
    """Let a model judge two runs: both orders of each pair, ties, and how much the judge goes by place.

    The questions and both answers are sent to the endpoint.
    """
    from fedllm.evaluation.duel import duel
    from fedllm.models.endpoint import Endpoint

    try:
        judge = Endpoint(base_url=endpoint, model=model, api="chat", api_key_env=key_env, timeout=timeout,
                         parallel=parallel, logprobs=False)
    except RecipeError as error:  # `Endpoint.base_url must ...` is of the option that says it
        key, gap, rest = str(error).removeprefix("Endpoint.").partition(" ")
        raise RecipeError(f"{OPTIONS.get(key, key)}{gap}{rest}") from None
    found, at = duel(a, b, data, judge, limit=limit, max_new_tokens=max_new_tokens, prices=_prices(price),
                     verdict_tokens=verdict_tokens, name=name,
                     trust_remote_code=trust_remote_code)
    if as_json:
        put({**{k: v for k, v in found.as_json().items() if k != "rows"}, "file": str(at)})
    else:
        show_duel(found, at)


def _prices(text: str | None) -> tuple[float, float] | None:
    try:
        return None if text is None else (float(text.split(":")[0]), float(text.split(":")[1]))
    except (ValueError, IndexError):
        raise RecipeError(f"--price {text!r}: allowed are two numbers, as in 2.5:10") from None


def show_duel(found: Duel, at: Path) -> None:
    """The count, the win rate, what the judge's taste for a place is, and what it cost."""
    table = Table(title=f"{found.a} against {found.b}, judged by {found.judge}", title_justify="left",
                  title_style="bold")
    counts = (("wins", found.wins), ("ties", found.ties), ("losses", found.losses),
              ("inconsistent", found.inconsistent), ("invalid", found.invalid), ("failed", found.failed))
    for name, _ in counts:
        table.add_column(name, justify="right")
    table.add_row(*(str(n) for _, n in counts))
    out.print(table)
    rate = "no verdict could be read" if found.win_rate is None else (
        f"{found.win_rate:.1%} (95 %: {found.low:.1%} to {found.high:.1%}); ties and inconsistent verdicts count half")
    p = found.position
    out.print(f"win rate  {rate}\nposition  the first place won {p['first']}, the second {p['second']}, neither "
              f"{p['tie']} of {sum(p.values())} verdicts; {found.inconsistent} questions went by place alone\n"
              f"spent     {found.calls} calls, {found.prompt_tokens:,} tokens read, {found.completion_tokens:,} said"
              + ("" if found.cost is None else f", {found.cost:.4f} at the prices given"), highlight=False)
    if found.stopped:
        out.print(f"[yellow]stopped[/] {found.stopped}", highlight=False, soft_wrap=True)
    out.print(f"[dim]kept in[/dim] {at}", highlight=False, soft_wrap=True)

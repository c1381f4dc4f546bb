"""Commands of an audit, to be mounted beside the others: `fedllm audit verify RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

audit = typer.Typer(no_args_is_help=True, help="Check a run: whether its record is what the run wrote.")
console = Console()


@audit.callback()
def _group() -> None:
    """Keeps `verify` a word of its own while it is the only one."""


@audit.command()
def verify(path: Annotated[Path, typer.Argument(help="A run's folder, as in runs/demo.")],
           head: Annotated[str | None, typer.Option(help="The hash that you kept of the run's last event.")] = None,
           ) -> None:
    """Find every line of a run's record that was edited, dropped, added or moved. Exit code 1 when there is one."""
    from fedllm.app.audit import verify as look

    found = look(path)
    findings = list(found.findings)
    if head is not None and head != found.head:
        findings.append(f"the last line's hash is {found.head or 'none'}, and you kept {head}")
    for finding in findings[:50]:
        console.print(f"[bold red]changed[/] {finding}", highlight=False, soft_wrap=True)
    if len(findings) > 50:
        console.print(f"and {len(findings) - 50} more", highlight=False)
    if findings:
        raise typer.Exit(1)
    state = "a finished run" if found.finished else "a run that is not finished"
    console.print(f"intact: {found.events} events of {state}\nhead    {found.head}", highlight=False, soft_wrap=True)

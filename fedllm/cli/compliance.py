"""`fedllm compliance`: what text left a run's clients, what the gate kept back, and by which rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.cli.said import Json, put

out = Console()


def compliance(path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a site's store.",
                                                    show_default=False)],
               items: Annotated[bool, typer.Option("--items", help="Every text, by its hash.")] = False,
               as_json: Json = False) -> None:
    """Show what the gate (layer responsible_gate) let go and kept back: who, what, why, by which rule.

    Exit code 1 when text left that no gate looked at.
    """
    from fedllm.report.compliance import compliance as read

    found = read(path)
    if as_json:
        put(found.as_json())
    else:
        table = Table(title=f"text that left, and that did not: {escape(found.of)}", title_justify="left")
        names = ("round", "who", "what", "sha256", "done", "rules") if items else (
            "who", "what", "done", "rule", "texts")
        for name in names:
            table.add_column(name)
        rows = [(p.round, p.client, f"{p.phase}/{p.key}", p.sha, p.done, ", ".join(p.rules)) for p in found.pieces
                ] if items else found.lines()
        for row in rows:
            table.add_row(*(escape(str("" if v is None else v)) for v in row))
        if rows:
            out.print(table)
        else:
            out.print(f"{found.of}: no text came to a gate", markup=False, highlight=False, soft_wrap=True)
        for reply in found.whole:
            at = "" if reply["round"] is None else f"round {reply['round']}, "
            out.print(f"{at}{reply['client']}, {reply['phase']}: no reply that counts: {reply['why']}", markup=False,
                      highlight=False, soft_wrap=True)
        said = f"; it demanded {json.dumps(dict(found.demands))}" if found.demands else ""
        out.print(f"rules {', '.join(found.rules) or '(a site keeps its own)' if found.pieces else 'none'}{said}",
                  markup=False, highlight=False, soft_wrap=True)
        for phase in found.silent:
            out.print(f"no gate looked at the text of {phase}", markup=False, highlight=False, soft_wrap=True)
    if found.silent:
        raise typer.Exit(1)

"""How a command answers a program: one JSON object on standard output, of the shape that `fedllm schema` tells."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON; `fedllm schema COMMAND` tells its shape.")]


def put(facts: Mapping[str, Any]) -> None:
    """One object on a line of its own; not even a terminal breaks it."""
    typer.echo(json.dumps(facts, default=str))


def printable(text: str) -> str:
    """What may have come from a site, as a terminal may show it: no escapes, and not without an end."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:4000])


def put_error(error: Exception, says: str) -> None:
    """What went wrong, as one object on standard error."""
    sys.stderr.write(json.dumps({"error": type(error).__name__, "says": says}) + "\n")


def schema(command: Annotated[str | None, typer.Argument(help="A command, as in `plan` or `keys new`.",
                                                         show_default=False)] = None, as_json: Json = False) -> None:
    """The JSON Schema of what a command prints with --json; without a command, all of them by name."""
    from fedllm.cli.shapes import schema_of, schemas

    put(schemas() if command is None else schema_of(command))

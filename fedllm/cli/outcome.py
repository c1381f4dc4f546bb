"""What a command that is done says of what it made."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from fedllm.cli.consoles import leads_nowhere
from fedllm.cli.guard import err
from fedllm.cli.said import put

out = Console()


def show_done(result: Any, as_json: bool) -> None:
    """A run that is done is done, whatever the console takes of it."""
    from fedllm.cli.tables import show_result

    try:
        if as_json:
            put({"event": "result", "folder": str(result.folder), **result.as_json()})
        else:
            show_result(out, result)
        sys.stdout.flush()
    except OSError as error:
        leads_nowhere()
        err.print(f"the run is done, and what is said of it cannot be printed ({error.strerror}); it stands in "
                  f"{result.folder}", markup=False, highlight=False, soft_wrap=True)


def show_made(what: str, path: Any, as_json: bool) -> None:
    """Where what was made lies."""
    if as_json:
        put({what: str(path)})
    else:
        out.print(str(path), highlight=False, markup=False, soft_wrap=True)

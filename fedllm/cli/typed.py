"""Lines that somebody types, until an empty one or the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator


def lines() -> Iterator[str]:
    """One after the other; Ctrl-C and Ctrl-D end them."""
    while line := _line("you> "):
        yield line


def _line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""

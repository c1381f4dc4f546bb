"""The frame of a page: its style and script inside it, and sections of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = (Path(__file__).parent / "report.css").read_text
SCRIPT = (Path(__file__).parent / "report.js").read_text


def page(title: str, body: str) -> str:
    """A whole page of HTML that needs nothing else, plotly included; `body` is markup."""
    import plotly.offline

    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)} - fedllm"
            "</title><meta name='viewport' content='width=device-width, initial-scale=1'><meta name='color-scheme' "
            f"content='light dark'><style>{STYLE()}</style><script>{plotly.offline.get_plotlyjs()}</script></head>"
            f"<body><main>{body}</main><script>{SCRIPT()}</script></body></html>")


def section(title: str, says: str, inner: str | None) -> str:
    """A part of the page under a heading; nothing where there is nothing in it."""
    if not inner:
        return ""
    return f"<section><h2>{escape(title)}</h2>{note(says) if says else ''}{inner}</section>"


def note(says: str) -> str:
    """A paragraph in small; `what is between backticks` is code."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(says))
    return f"<p class='note'>{text}</p>"


def sentence(parts: Iterable[str]) -> str:
    """What is there, as one sentence; empty where nothing is."""
    said = ", and ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def side_by_side(parts: Sequence[str | None]) -> str | None:
    """Cards beside each other where there is room."""
    have = [p for p in parts if p]
    return f"<div class='grid'>{''.join(f'<div class=card>{p}</div>' for p in have)}</div>" if have else None

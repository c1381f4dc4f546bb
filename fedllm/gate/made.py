"""Synthetic rows on the wire: a row as JSON that says who made it, from what, and under which license."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import PayloadError

SAYS = ("by", "license", "seed")
"""What a synthetic row must say of itself: its generator, its license, and the seed of its draw."""


def made(row: Mapping[str, Any], by: str, license: str, seed: int, **more: Any) -> str:
    """A synthetic row as it crosses the wire; `more` is what else is known: a prompt's hash, a method."""
    return again(row, {"by": by, "license": license, "seed": seed, **more})


def again(row: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """The same with what it already says of its making."""
    return json.dumps({**row, "made": dict(origin)}, sort_keys=True, ensure_ascii=False)


def read(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row, and what it says of its making ({}: nothing); PayloadError where the text is no row."""
    try:
        row = json.loads(text)
        origin = row.pop("made", {})
        if not isinstance(origin, dict):
            raise TypeError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise PayloadError(f"{text[:60]!r} is no synthetic row; allowed is a JSON object") from None
    return row, origin


def license_of(row: Mapping[str, Any]) -> str:
    """What a row says of its license."""
    return str(row.get("license") or "unknown")

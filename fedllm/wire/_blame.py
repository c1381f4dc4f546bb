"""Who broke a session of a protocol, and for how long it stays out of the next ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

BROKE = "broke"
"""In a layer's state: client -> how often it broke a session, and the number of the last one that it stays out of."""


def blame(state: Any, client: str) -> None:
    """It broke the session of this number, and stays out twice as long as the last time."""
    times = state.setdefault(BROKE, {}).get(client, [0, 0])[0] + 1
    state[BROKE][client] = [times, state["sessions"] + 2 ** min(times - 1, 20)]


def staying_out(state: Any, asked: Collection[str], least: int, what: str) -> dict[str, str]:
    """Of those asked, who stays out of this session and why; nobody, where fewer than `least` would be left."""
    out = {c: f"broke {what}, and stays out until session {until}" for c, (_, until) in state.get(BROKE, {}).items()
           if c in asked and state["sessions"] <= until}
    return out if len(asked) - len(out) >= least else {}

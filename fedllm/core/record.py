"""The record of a run: an append-only list of events, and the counters read from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]


class Record:
    """Collects events; `sink` gets each one as it happens (a run folder appends it to `events.jsonl`)."""

    def __init__(self, sink: Callable[[Event], None] | None = None) -> None:
        self.sink = sink
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)  # (direction, phase) -> bytes on the wire
        self.events: list[Event] = []

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        event = {"kind": kind, **fields}
        if self.sink:
            self.sink(event)
        else:
            self.events.append(event)

    def crossed(self, direction: str, phase: str, client: str, size: int, round: int, payload: str) -> None:
        """Book `size` bytes of one payload between server and `client` ("down" or "up")."""
        self.bytes[direction, phase] += size
        self.emit("wire", round=round, phase=phase, client=client, direction=direction, payload=payload, bytes=size)

    def totals(self) -> dict[str, Any]:
        """`up`, `down` and `by_phase`, in bytes."""
        by_phase: dict[str, dict[str, int]] = {}
        for (direction, phase), size in sorted(self.bytes.items()):
            by_phase.setdefault(phase, {"up": 0, "down": 0})[direction] += size
        total = {way: sum(p[way] for p in by_phase.values()) for way in ("up", "down")}
        return {**total, "by_phase": by_phase}

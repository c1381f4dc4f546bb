"""The record of a run: an append-only list of events, and the counters read from them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
TEST = "evaluation"
"""The purpose of what crosses the wire to test a model, and not to make it."""
TESTS = ("score", "spoken")
"""Client functions that do nothing but test: version 0.1.0 told tests by these alone."""


def is_test(phase: str, purpose: str | None = None) -> bool:
    """Whether what crossed in this phase was sent to test."""
    return purpose == TEST or phase.rpartition(".")[2] in TESTS


class Record:
    """Collects events; `sink` gets each one as it happens (a run folder appends it to `events.jsonl`)."""

    def __init__(self, sink: Callable[[Event], None] | None = None) -> None:
        self.sink = sink
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)  # (direction, phase) -> bytes on the wire, of rounds
        self.tests: dict[tuple[str, str], int] = defaultdict(int)  # the same of what was sent to test
        self.purpose: dict[str, str] = {}
        self.events: list[Event] = []

    def testing(self) -> Record:
        """The same ledger for whoever tests: what crosses the wire is booked apart, and marked so in its event."""
        other = copy.copy(self)
        other.bytes, other.purpose = self.tests, {"purpose": TEST}
        return other

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        event = {"kind": kind, **fields}
        if self.sink:
            self.sink(event)
        else:
            self.events.append(event)

    def crossed(self, direction: str, phase: str, client: str, size: int, round: int, payload: str,
                **holds: str | Mapping[str, int]) -> None:
        """Book `size` bytes of one payload between server and `client` ("down" or "up"); `holds`: what is in it, among
        it its `parts` and their bytes (`form.by_part`)."""
        self.bytes[direction, phase] += size
        self.emit("wire", round=round, phase=phase, client=client, direction=direction, payload=payload, bytes=size,
                  **holds, **self.purpose)

    def totals(self) -> dict[str, Any]:
        """`up`, `down` and `by_phase` of the rounds, in bytes; under `evaluation` the same of what was sent to test."""
        return {**summed(self.bytes), "evaluation": summed(self.tests)}


def summed(sizes: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """(direction, phase) -> bytes, as `up`, `down` and `by_phase` in whole bytes."""
    by_phase: dict[str, dict[str, int]] = {}
    for (direction, phase), size in sorted(sizes.items()):
        by_phase.setdefault(phase, {"up": 0, "down": 0})[direction] += round(size)
    total = {way: sum(p[way] for p in by_phase.values()) for way in ("up", "down")}
    return {**total, "by_phase": by_phase}

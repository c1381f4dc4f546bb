"""What crosses the wire while something is tried, added up."""

from __future__ import annotations

from collections import defaultdict

from fedllm.core.record import Event

Bytes = dict[tuple[str, str], float]
"""(direction, phase) -> bytes."""


class Crossed:
    """Hears the events of a record: bytes by phase, and by phase and client."""

    def __init__(self) -> None:
        self.bytes: Bytes = defaultdict(float)
        self.each: dict[tuple[str, str, str], float] = defaultdict(float)

    def __call__(self, event: Event) -> None:
        if event["kind"] == "wire":
            self.bytes[event["direction"], event["phase"]] += event["bytes"]
            self.each[event["direction"], event["phase"], event["client"]] += event["bytes"]

"""One client's share of one ask, and what its answer cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedllm.core.ask import ClientId
from fedllm.core.program import Fold


@dataclass
class Took:
    """What one answer cost: local steps, and bytes down and up."""

    steps: float = 0.0
    down: int = 0
    up: int = 0

    def count(self, way: str, size: int) -> None:
        """Count a message's bytes."""
        self.down, self.up = self.down + size * (way == "down"), self.up + size * (way == "up")


@dataclass(frozen=True)
class Job:
    """One client's share of one ask."""

    fold: Fold
    client: ClientId
    visit: int
    ends: float | None  # monotonic time after which its answer is late
    took: Took = field(default_factory=Took)

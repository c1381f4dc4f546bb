"""What a federation holds: each client's rows, and a test set that belongs to nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
"""One example. Generation rows have `prompt` and `response` (text); classification rows have `text` and `label`
(an int in [0, number of labels)); an environment's row holds its name and parameters.
`category`, where present, is a string used for skew and per-category scores."""

Task = Literal["generation", "classification", "environment"]


@dataclass(frozen=True)
class Shard:
    """What one client holds: rows to learn from, rows kept back to test on, and how the client was made."""

    train: Sequence[Row]
    test: Sequence[Row] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """Clients' shards by client id (in a fixed order), and the held-out global test."""

    clients: Mapping[str, Shard]
    test: Sequence[Row]
    task: Task
    labels: tuple[str, ...] = ()  # classification: label names by index
    public: Sequence[Row] = ()  # nobody's rows: whoever takes part may train on them
    streamed: bool = False
    """Whether clients' rows are read when asked for, and should not be kept: there may be a million of them."""

    def pooled(self) -> list[Row]:
        """All training rows in client order: what `centralized` trains on, and only a simulator may do."""
        return [row for shard in self.clients.values() for row in shard.train]

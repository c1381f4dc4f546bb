"""What a federation holds: each client's rows, and a test set that belongs to nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.core.client import SERVER
from fedllm.core.errors import DataError
from fedllm.tasks.row import Row

__all__ = ["Federation", "Row", "Shard"]


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
    task: str
    """The id of a task (`fedllm/tasks`)."""
    labels: tuple[str, ...] = ()  # of a task with labels: their names by index
    public: Sequence[Row] = ()  # nobody's rows: whoever takes part may train on them
    cautions: tuple[str, ...] = ()
    """What of the rows may not be meant."""
    streamed: bool = False
    """Whether clients' rows are read when asked for, and should not be kept: there may be a million of them."""

    def __post_init__(self) -> None:
        if SERVER in self.clients:
            raise DataError(f"no client may be called '{SERVER}': so the server calls itself, and its rows are "
                            "everybody's; give the client another id")

    @property
    def acts(self) -> bool:
        """Whether its rows are environments to act in, and no text."""
        return self.task == "environment"

    def pooled(self) -> list[Row]:
        """All training rows in client order: what `centralized` trains on, and only a simulator may do."""
        return [row for shard in self.clients.values() for row in shard.train]

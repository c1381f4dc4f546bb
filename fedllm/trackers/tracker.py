"""What a tracker is: a place that is told numbers by step, and goes on where it was when a run does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class Tracker:
    """One run at one tracker. It may raise whatever it likes: the run goes on without it."""

    package: ClassVar[str] = ""
    """What must be importable."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any], id: str | None) -> str:
        """Begin under this name, or go on with the run that `id` names; the id by which to go on.

        `folder` is the tracker's own inside of the run's; `config` is flat, numbers and short words.
        """
        raise NotImplementedError

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name as they stand after so many rounds."""
        raise NotImplementedError

    def close(self) -> None:
        """The run has ended or was stopped."""

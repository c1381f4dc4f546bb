"""trackio: a database on this machine (TRACKIO_DIR says where); `trackio show --project fedllm` shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedllm.trackers.tracker import Tracker


class Trackio(Tracker):
    """One run of the project `fedllm`; its name is its id, so that no two runs may have the same."""

    package: ClassVar[str] = "trackio"

    def open(self, folder: Path, name: str, config: Mapping[str, Any], id: str | None) -> str:
        os.environ.setdefault("TRACKIO_DIR", str(folder))
        import trackio

        own = id or f"{name}-{os.urandom(4).hex()}"
        self.run = trackio.init(project="fedllm", name=own, config=dict(config), resume="allow", embed=False)
        return own

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()

"""TensorBoard: event files in the run's folder (`tensorboard --logdir RUN/trackers/tensorboard`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedllm.trackers.tracker import Tracker


class TensorBoard(Tracker):
    """Writes event files; a run that goes on adds another file to the same folder."""

    package: ClassVar[str] = "tensorboard"

    def open(self, folder: Path, name: str, config: Mapping[str, Any], id: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        if id is None:
            lines = "\n".join(f"| {k} | {v} |" for k, v in config.items())
            self.writer.add_text("recipe", f"| key | value |\n|---|---|\n{lines}", 0)
        return name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

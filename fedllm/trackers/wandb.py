"""Weights & Biases: online where WANDB_API_KEY is set (or WANDB_MODE says so), else offline in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedllm.trackers.tracker import Tracker


class WandB(Tracker):
    """One run of the project `fedllm` (or of that which WANDB_PROJECT names); it never asks for a login."""

    package: ClassVar[str] = "wandb"

    def open(self, folder: Path, name: str, config: Mapping[str, Any], id: str | None) -> str:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        quiet = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True,
                               x_disable_meta=True)
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "fedllm"), name=name, config=dict(config),
                              id=id or os.urandom(4).hex(), resume="allow", dir=str(folder), mode=mode,
                              settings=quiet)
        return str(self.run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()

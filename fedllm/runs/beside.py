"""Runs a recipe's baselines in a process of their own beside the run, where the machine has a core to spare."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedllm.methods.registry import make_method
from fedllm.runs.acting import by_habit
from fedllm.runs.build import Parts, build
from fedllm.runs.folder import RunFolder
from fedllm.runs.judge import run_baseline
from fedllm.runs.made import rules_in, run_rule
from fedllm.runs.progress import Quiet
from fedllm.runs.recipe import load_recipe
from fedllm.runs.watch import end_with

FILE, LOG = "baselines.json", "baselines.log"
SILENCE = 1800.0
"""Seconds without a round of any baseline after which the process is given up, and the run does the rest itself."""


class Beside:
    """A process that works through the baselines of the run in a folder; it ends when this one does."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / LOG
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", __name__, str(folder), str(os.getpid())], stdout=log,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it is done or has failed; what it left undone is for the caller."""
        while self.process.poll() is None and time.time() - self.log.stat().st_mtime < SILENCE:
            time.sleep(0.1)
        self.stop()

    def stop(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


def beside(parts: Parts, folder: RunFolder) -> Beside | None:
    """The process, started; None where there is no baseline to run, or no core of the CPU that would be idle."""
    recipe = parts.recipe
    spare = len(os.sched_getaffinity(0)) - recipe.engine.threads
    left = set(recipe.evaluate.baselines) - set(baselines(folder))
    simulated = recipe.engine.kind in ("in_process", "vectorized") and parts.engine is None and (
        recipe.engine.processes == 1)
    on_cpu = torch.device(parts.world.model.device).type == "cpu"
    return Beside(folder.path) if left and spare > 0 and simulated and on_cpu else None


def baselines(folder: RunFolder) -> dict[str, Any]:
    """The evaluations of the baselines that are done."""
    return folder.read(FILE) if (folder.path / FILE).exists() else {}


def run_baselines(parts: Parts, folder: RunFolder, progress: Quiet) -> dict[str, Any]:
    """Do the baselines that are not done yet, each kept as it ends; all their evaluations."""
    done = baselines(folder)
    for name in parts.recipe.evaluate.baselines:
        if name not in done:
            progress.note(f"running {name} for comparison")
            done[name] = (ruled(name, parts) if rules_in([name]) else
                          run_baseline(parts, make_method(name), parts.recipe.rounds, progress))
            folder.write_json(FILE, done)
    return done


def ruled(name: str, parts: Parts) -> dict[str, Any]:
    """A rule's evaluation; in environments over as many episodes as the method's own."""
    if parts.world.federation.acts:
        return by_habit(name, parts.world, vars(parts.method)["test_episodes"])
    return run_rule(name, parts.world)


class Told(Quiet):
    """Says in the log that it lives."""

    def baseline(self, name: str, done: int, total: int) -> None:
        print(f"{name}: round {done} of {total}", flush=True)  # noqa: T201


def main(folder: str, parent: str) -> None:
    """The process itself, which ends with the run that it is for."""
    end_with(int(parent))
    room = RunFolder.open(Path(folder))
    run_baselines(build(load_recipe(room.path / "recipe.yaml")), room, Told())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What another process writes into a run's record, told to a display of this one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.record import is_test
from fedllm.runs.fits import cohort_size
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import Quiet

POLL = 0.5
NAMED = {"missing": "gives no answer", "refused": "gave an answer that is refused", "left_out": "takes no part",
         "suspect": "may be lost", "back": "is back", "reopened": "opened the run again"}
"""Events of single clients that are told as they happen."""


class Follower:
    """Reads on where it stood, and tells."""

    def __init__(self, run: Path, shown: Quiet) -> None:
        self.run, self.shown, self.number = run, shown, -1
        self.recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        done = max(RunFolder(run).rounds(), default=0)
        self.at = self._size()
        self.number = done - 1
        shown.rounds(int(self.recipe["rounds"]), done)

    def _size(self) -> int:
        path = self.run / "events.jsonl"
        return path.stat().st_size if path.exists() else 0

    def look(self) -> None:
        """Tell what is new."""
        if (size := self._size()) <= self.at:
            self.at = size  # a run that goes on cuts what it does again
            return
        with (self.run / "events.jsonl").open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.at += len(line)
                with contextlib.suppress(ValueError):
                    self._tell(json.loads(line))

    def _tell(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "wire" and event["round"] > self.number and not is_test(event["phase"], event.get("purpose")):
            self.number = int(event["round"])
            self.shown.round(self.number, self._asked())
        self.shown.saw(event)
        if kind == "round":
            self.shown.round_done(event)
        elif kind == "evaluation":
            self.shown.tested(int(event["round"]), event.get("global"))
        elif kind in NAMED:
            why = "".join(c if c.isprintable() else "?" for c in str(event.get("why", ""))[:300])
            self.shown.note(f"{event['client']} {NAMED[kind]}{f': {why}' if why else ''}")

    def _asked(self) -> int:
        path = self.run / "clients.json"
        known = len(json.loads(path.read_text())) if path.exists() else 0
        return cohort_size(self.recipe["clients"]["per_round"], known) if known else 0


@contextlib.contextmanager
def following(run: Path, shown: Quiet) -> Iterator[None]:
    """The display is told while the block lasts, and the rest as it ends."""
    follower, over = Follower(run, shown), threading.Event()

    def work() -> None:
        while not over.wait(POLL):
            follower.look()

    thread = threading.Thread(target=work, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10.0)
        follower.look()

"""From a run's events to its trackers: numbers alone, each tracker on a thread of its own that nothing waits for long.

No text of a row, no name of a client, no path, address or key is told: figures of rounds and tests, and of the recipe
what is a number or a short word.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.record import Event, is_test
from fedllm.trackers.registry import trackers

log = logging.getLogger(__name__)
PATIENCE = 30.0
"""Seconds that a run's end waits for a tracker to take the rest."""
SECTIONS = ("method", "space", "select", "local", "clients", "engine", "evaluate")
SHORT = re.compile(r"[\w.+-]{1,64}")
UNTOLD = re.compile(r"key|token$|secret|passw|url|endpoint|address|env|path|file|folder|profiles|models|start_from",
                    re.IGNORECASE)
Point = tuple[str, int, dict[str, float]]
"""(kind of event, rounds done, figures)."""


def numbers(values: Mapping[str, Any], ahead: str) -> dict[str, float]:
    """What of a mapping is a finite number, under `ahead/name`."""
    return {f"{ahead}/{k}": float(v) for k, v in values.items()
            if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


class Figures:
    """Events in, points out."""

    def __init__(self, sent: Mapping[str, Any] | None = None) -> None:
        """`sent` are bytes "up" and "down" before the first event."""
        self.bytes = Counter({way: int((sent or {}).get(way, 0)) for way in ("up", "down")})
        self.missing = 0

    def __call__(self, event: Event) -> Point | None:
        """The point that an event makes, if it makes one."""
        kind = event["kind"]
        if kind == "wire" and not is_test(event["phase"], event.get("purpose")):
            self.bytes[event["direction"]] += event["bytes"]
        elif kind == "missing":
            self.missing += 1
        elif kind == "evaluation":
            every = [numbers(m, "clients") for m in (event.get("clients") or {}).values()]
            mean = {k: sum(m[k] for m in every) / len(every) for k in (every[0] if every else {})
                    if k != "clients/n" and all(k in m for m in every)}
            found = numbers(event.get("global") or {}, "test") | mean
            return ("evaluation", int(event["round"]), found) if found else None
        elif kind == "round":
            rest = {k: v for k, v in event.items() if k not in ("round", "loss", "cohort")}
            found = {**numbers({"loss": event.get("loss")}, "train"), **numbers(rest, "round"),
                     **numbers(self.bytes, "bytes"),
                     **numbers({"asked": len(event["cohort"]), "missing": self.missing,
                                "skipped": int("skipped" in event)}, "round")}
            self.missing = 0
            return "round", int(event["round"]) + 1, found
        return None


def config_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a recipe, flat."""
    out = {k: recipe[k] for k in ("rounds", "seed") if k in recipe}
    out["model"] = str((recipe.get("model") or {}).get("name", "")).rstrip("/").rpartition("/")[2]
    out["layers"] = "+".join(str(x["name"]) for x in recipe.get("layers") or ()) or "none"
    for section in SECTIONS:
        for key, value in (recipe.get(section) or {}).items():
            if UNTOLD.search(key) or isinstance(value, bytes) or value is None:
                continue
            if isinstance(value, bool | int | float) or (isinstance(value, str) and SHORT.fullmatch(value)):
                out[f"{section}.{key}"] = value
    return {k: v for k, v in out.items() if not isinstance(v, str) or SHORT.fullmatch(v)}


class Line:
    """One tracker of one run, on its thread; its file says what it was told last, so that a resumed run goes on."""

    def __init__(self, folder: Path, which: str, name: str, config: Mapping[str, Any]) -> None:
        self.folder, self.which, self.name, self.config = folder, which, name, config
        self.file = folder / f"{which}.json"
        self.points: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self.trouble = ""
        self.thread = threading.Thread(target=self._work, name=f"track {which}", daemon=True)
        self.thread.start()

    def put(self, point: Point) -> None:
        """Tell it, some time soon."""
        if not self.trouble:
            self.points.put(point)

    def close(self, patience: float) -> None:
        """Let it take the rest; a warning where it does not."""
        self.points.put(None)
        self.thread.join(patience)
        if self.thread.is_alive():
            self._fails(f"it has not taken everything within {patience:g} s")

    def _work(self) -> None:
        try:
            at = json.loads(self.file.read_text()) if self.file.exists() else {"id": None, "told": {}}
            place = self.folder / self.which
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            tracker = trackers()[self.which]()
            at["id"] = tracker.open(place, self.name, self.config, at["id"])
            self._keep(at)
            while (point := self.points.get()) is not None:
                kind, step, figures = point
                if step > at["told"].get(kind, -1):  # rounds that are done again after a crash were told
                    tracker.log(step, figures)
                    at["told"][kind] = step
                    self._keep(at)
            tracker.close()
        except BaseException as error:  # of software that is not ours: whatever it raises ends itself alone
            self._fails(f"{type(error).__name__}: {error}")

    def _keep(self, at: Mapping[str, Any]) -> None:
        fresh = self.file.with_suffix(".tmp")
        fresh.write_text(json.dumps(at))
        fresh.replace(self.file)

    def _fails(self, why: str) -> None:
        if not self.trouble:
            self.trouble = why
            log.warning("track: %s is told nothing any more (%s); the run goes on, and `fedllm track RUN --to %s` "
                        "tells it later", self.which, why[:300], self.which)


class Tracking:
    """All trackers of a run."""

    def __init__(self, run: Path, names: Sequence[str], recipe: Mapping[str, Any],
                 sent: Mapping[str, Any] | None = None) -> None:
        self.figures = Figures(sent)
        folder = run / "trackers"
        if names:
            folder.mkdir(mode=0o700, exist_ok=True)
        self.lines = [Line(folder, name, run.name, config_of(recipe)) for name in names]

    def __call__(self, event: Event) -> None:
        """An event of the run."""
        if self.lines and (point := self.figures(event)):
            for line in self.lines:
                line.put(point)

    def close(self, patience: float = PATIENCE) -> list[str]:
        """The run has ended; what went wrong, by tracker."""
        for line in self.lines:
            line.close(patience)
        return [f"{line.which}: {line.trouble}" for line in self.lines if line.trouble]


def replayed(run: Path, names: Sequence[str], recipe: Mapping[str, Any], events: Iterable[Event]) -> list[str]:
    """Tell trackers what a run's record holds that they have not been told; what went wrong, by tracker."""
    tracking = Tracking(run, names, recipe)
    for event in events:
        tracking(event)
    return tracking.close(600.0)

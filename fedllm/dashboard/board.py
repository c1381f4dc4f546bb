"""All runs under the roots, brought up to date for whoever looks, once for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.dashboard.acts import Resumed, resume, stop
from fedllm.dashboard.shelf import Place, places
from fedllm.dashboard.watched import Watched
from fedllm.tasks.registry import metrics

EVERY, SEARCH = 0.7, 3.0
"""Least seconds between two looks at the runs, and between two searches for new ones."""


class Board:
    """What the page shows; safe to use from several threads."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.runs: dict[str, Watched] = {}
        self.version = 0
        """Goes up with every change."""
        self.resumed: dict[str, Resumed] = {}
        self._lock = threading.Lock()
        self._looked = self._searched = -1e9

    def look(self) -> int:
        """Bring everything up to date, unless it has just been; gives the version."""
        with self._lock:
            if time.monotonic() - self._looked < EVERY:
                return self.version
            if time.monotonic() - self._searched > SEARCH:
                self._search()
                self._searched = time.monotonic()
            changed = [w for w in self.runs.values() if w.look()]
            ended = [r for r in self.resumed.values() if r.look()]
            self.version += bool(changed or ended)
            self._looked = time.monotonic()
            return self.version

    def _search(self) -> None:
        found: dict[str, Place] = {p.id: p for p in places(self.roots)}
        old = {id: w.place for id, w in self.runs.items()}
        if found != old:
            self.runs = {id: self.runs[id] if old.get(id) == p else Watched(p) for id, p in found.items()}
            self.version += 1

    def _known(self, id: str) -> Watched:
        if (run := self.runs.get(id)) is None:
            raise RunError("there is no such run here (any longer)")
        return run

    def list(self) -> dict[str, Any]:
        """Every run in a line."""
        with self._lock:
            return {"roots": [str(r) for r in self.roots], "shares": [n for n, m in metrics().items() if m.share],
                    "runs": [w.short() for w in self.runs.values()]}

    def run(self, id: str) -> dict[str, Any]:
        """One run in full; RunError when it is not here."""
        with self._lock:
            run = self._known(id)
            began = self.resumed.get(id)
            return {**run.whole(), "resume": began.as_json() if began else None}

    def versions(self, ids: Sequence[str]) -> dict[str, Any]:
        """What changes when one of these runs does."""
        with self._lock:
            return {i: (w.version, w.is_held, self.resumed[i].code if i in self.resumed else 0)
                    for i in ids if (w := self.runs.get(i))}

    def stop(self, id: str) -> str:
        """Ask whoever works on a run to end it in order; what was done, in a sentence."""
        with self._lock:
            run = self._known(id)
            return stop(self.runs.get(run.place.within, run).place.path if self._in_comparison(run) else run.place.path)

    def resume(self, id: str) -> str:
        """Begin `fedllm resume` of a run in a process of its own."""
        with self._lock:
            run = self._known(id)
            if run.place.kind == "comparison" or self._in_comparison(run):
                raise RunError("a cell of a comparison is run by the comparison: call the same `fedllm compare` again, "
                               "which goes on")
            if (began := self.resumed.get(id)) and began.code is None:
                raise RunError(f"`fedllm resume` has been begun already, as process {began.pid}")
            self.resumed[id] = resume(run.place.path, run.short())
            self.version += 1
            return f"`fedllm resume` goes on with it, as process {self.resumed[id].pid}"

    def _in_comparison(self, run: Watched) -> bool:
        above = self.runs.get(run.place.within)
        return above is not None and above.place.kind == "comparison"

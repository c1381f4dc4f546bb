"""A site's own ledger over its rows: what it has answered and released in all runs, kept in its store.

It is written before an answer leaves, and read before the next one is begun. No coordinator can reset it: a run of
another name, a restart or a resumed run finds it as it was. Deleting `ledger.json` is the organization's own act.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.privacy.accountant import Ledger, Release
from fedllm.runs.store import private_folder, read_json, write_atomic

LEDGER = "ledger.json"


class SiteLedger:
    """The ledger in a site's store; each of its methods is one change that is on disk when it comes back."""

    def __init__(self, store: Path) -> None:
        private_folder(store)
        self.path = store / LEDGER

    def read(self) -> dict[str, Any]:
        """All that is booked: `runs` (name -> phase -> answers), `releases`, and `work` in all."""
        if not self.path.exists():
            return {"runs": {}, "releases": [], "work": {}}
        return dict(read_json(self.path))

    def answer(self, run: str, phase: str, repeats: int, key: str, most: int | None, in_all: int | None) -> str | None:
        """Book one answer of this phase; a reason when it would be one more than may be given.

        The same question of the same round is the same answer, and counts once. Where a round asks a phase `repeats`
        times, so many answers are one round.
        """
        with self._change() as kept:
            phases = kept["runs"].setdefault(run, {})
            keys = phases.setdefault(phase, {"answers": 0, "repeats": repeats, "seen": []})
            mark = hashlib.sha256(key.encode()).hexdigest()[:24]
            if mark in keys["seen"]:
                return None
            keys["answers"] += 1
            used = rounds_of(phases)
            total = sum(rounds_of(p) for p in kept["runs"].values())
            if most is not None and used > most:
                raise _Undo(f"{used} rounds of this run, allowed are {most} (most_rounds)")
            if in_all is not None and total > in_all:
                raise _Undo(f"{total} rounds in all runs, allowed are {in_all} (rounds_in_all)")
            if most is not None or in_all is not None:  # then there are not many
                keys["seen"].append(mark)
        return self.undone

    def query(self, most: int) -> str | None:
        """Book one answer to a query; a reason when it would be one more than `most`, over all runs."""
        with self._change() as kept:
            kept["queries"] = kept.get("queries", 0) + 1
            if kept["queries"] > most:
                raise _Undo(f"{most} queries are answered, allowed are {most} (most_queries)")
        return self.undone

    def spend(self, release: Release, count: int, epsilon: float | None, delta: float) -> None:
        """Book so many releases; BudgetSpent when they would pass `epsilon` at `delta`, over all runs."""
        with self._change() as kept:
            ledger = Ledger(kept)
            ledger.afford(release, epsilon, delta, count)
            ledger.book(release, count)

    def epsilon(self, delta: float) -> float:
        """What all runs together have cost the rows of this site, as its own ledger has it."""
        return Ledger(self.read()).epsilon(delta)

    def work(self, done: Mapping[str, float]) -> None:
        """Add what an answer took."""
        with self._change() as kept:
            for name, amount in done.items():
                kept["work"][name] = kept["work"].get(name, 0) + amount

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        """Read, change and write, one process at a time; an error or `_Undo` leaves the ledger as it was."""
        self.undone: str | None = None
        with (self.path.parent / ".ledger.lock").open("a") as lock:
            os.chmod(lock.name, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = self.read()
            try:
                yield kept
            except _Undo as why:
                self.undone = str(why)
                return
            try:
                write_atomic(self.path, json.dumps(kept, separators=(",", ":")).encode())
            except OSError as error:
                raise RunError(f"{self.path} cannot be written: {error.strerror}; nothing is answered that is not "
                               "booked") from None


class _Undo(Exception):
    """Leave the ledger as it was, for this reason."""


def rounds_of(phases: Mapping[str, Mapping[str, Any]]) -> int:
    """Rounds that so many answers make: of the phase that was asked most, a started round counts."""
    return max((-(-p["answers"] // max(1, p["repeats"])) for p in phases.values()), default=0)

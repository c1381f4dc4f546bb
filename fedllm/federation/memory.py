"""A site's own durable store of what its client remembers: it never leaves, and it survives every kind of kill.

Files: `<version>.json` is the memory before the round of that number; `staged-<attempt>.json` is what a round made of
it so far, with the answers given on the way. A staged memory becomes a version when the server says the round counted.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedllm.core.errors import RunError
from fedllm.engines.far.site import Body
from fedllm.runs.store import Blobs, blobs_in, freeze, private_folder, read_json, thaw, write_atomic

AT_ONCE = 4
"""Attempts that may be staged at a time; the oldest is one that failed."""


@dataclass
class Staged:
    """One attempt at a round: the memory as it stands, and the answers given so far by visit."""

    round: int
    memory: dict[str, Any]
    doc: Any
    changed: bool = False
    done: dict[str, Body] = field(default_factory=dict)
    before: list[Any] | None = None
    """The last visit, and what the memory was before it."""


class DiskMemory:
    """Implements `engines.far.site.Memory` in one folder (one run's, of one client)."""

    def __init__(self, folder: Path, at: int | None, behind: int = 2) -> None:
        """Rounds from `at` on are done again, so what they left is dropped (None: nothing is).

        `behind` is how many rounds the server may go back.
        """
        self.folder, self.behind = folder, behind
        self.blobs = Blobs(folder / "blobs")
        self.attempts: OrderedDict[str, Staged] = OrderedDict()
        private_folder(folder)
        for version in self.versions():
            if at is not None and version > at:
                self._path(version).unlink()

    def versions(self) -> list[int]:
        """Rounds before which a memory is kept, oldest first."""
        return sorted(int(p.stem) for p in self.folder.glob("[0-9]*.json"))

    def stage(self, attempt: str, round: int) -> dict[str, Any]:
        """The memory in this attempt at `round`; changes count when the attempt is settled."""
        if attempt not in self.attempts:
            found = self._staged(attempt)
            if found is None:
                version = max((v for v in self.versions() if v <= round), default=None)
                doc = freeze({}, self.blobs) if version is None else read_json(self._path(version))
                found = Staged(round, dict(thaw(doc, self.blobs)), doc)
            self.attempts[attempt] = found
            while len(self.attempts) > AT_ONCE:
                self._forget(next(iter(self.attempts)))
        return self.attempts[attempt].memory

    def answered(self, attempt: str, visit: str) -> Body | None:
        """What this visit answered, if it did."""
        staged = self.attempts.get(attempt) or self._staged(attempt)
        return staged.done.get(visit) if staged else None

    def keep(self, attempt: str, visit: str, reply: Body) -> None:
        """This visit is done; a changed memory is on disk, with the answer, before the answer leaves."""
        staged = self.attempts[attempt]
        doc = freeze(staged.memory, self.blobs) if staged.memory or staged.changed else staged.doc
        staged.done[visit], staged.before = reply, [visit, staged.doc]
        if doc != staged.doc:
            staged.doc, staged.changed = doc, True
            self._save(attempt, staged)
        elif not staged.changed:
            staged.done = {visit: reply}  # done again it would be the same: the last answer serves a lost reply

    def drop(self, attempt: str, visit: str) -> None:
        """The last visit of this attempt does not count, and its memory is as it was before it. Told twice, or of a
        visit that is not the last one here, it does nothing."""
        staged = self.attempts.get(attempt) or self._staged(attempt)
        if staged is None:
            return
        if staged.before is not None and staged.before[0] == visit:
            staged.doc, staged.before = staged.before[1], None
            staged.done.pop(visit, None)
            if staged.changed:
                self._save(attempt, staged)
        if attempt in self.attempts:  # the work may have stopped half-way
            staged.memory = dict(thaw(staged.doc, self.blobs))

    def settle(self, attempt: str, round: int) -> None:
        """The attempt counted: its memory is the one before round + 1. Told twice, it does nothing."""
        staged = self.attempts.get(attempt) or self._staged(attempt)
        if staged is not None and staged.changed:
            self._write(f"{round + 1:06d}.json", staged.doc)
        if staged is not None:
            self._forget(attempt)
            self._prune(round + 1 - self.behind)

    def _staged(self, attempt: str) -> Staged | None:
        path = self.folder / f"staged-{attempt}.json"
        if not attempt.isalnum() or not path.exists():
            return None
        raw = read_json(path)
        done: dict[str, Body] = {v: self.blobs.get(b).numpy().tobytes() if b else b"" for v, b in raw["done"].items()}
        return Staged(raw["round"], dict(thaw(raw["memory"], self.blobs)), raw["memory"], True, done, raw.get("before"))

    def _save(self, attempt: str, staged: Staged) -> None:
        done = {v: self._blob(r) for v, r in staged.done.items()}
        self._write(f"staged-{attempt}.json", {"round": staged.round, "memory": staged.doc, "done": done,
                                               "before": staged.before})

    def _blob(self, reply: Body) -> str:
        return self.blobs.put(torch.frombuffer(bytearray(reply), dtype=torch.uint8)) if len(reply) else ""

    def _write(self, name: str, value: Any) -> None:
        try:
            write_atomic(self.folder / name, json.dumps(value, separators=(",", ":")).encode())
        except OSError as error:
            raise RunError(f"{self.folder / name} cannot be written: {error.strerror}") from None

    def _forget(self, attempt: str) -> None:
        self.attempts.pop(attempt, None)
        with contextlib.suppress(OSError):
            (self.folder / f"staged-{attempt}.json").unlink()

    def _prune(self, oldest: int) -> None:
        """Keep the versions from `oldest` on and one before; blobs that nothing names go."""
        before = [v for v in self.versions() if v <= oldest]
        for version in before[:-1]:
            self._path(version).unlink()
        docs = [read_json(p) for p in self.folder.glob("*.json")]
        names = {n for d in docs for n in blobs_in([d["memory"], d.get("before")] if "done" in d else d)}
        names |= {b for d in docs if "done" in d for b in d["done"].values() if b}
        names |= {n for s in self.attempts.values() for n in blobs_in([s.doc, s.before])}
        self.blobs.keep(names)

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:06d}.json"

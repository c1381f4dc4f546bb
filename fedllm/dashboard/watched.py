"""One run's folder as the page shows it: how it stands, what its recipe says, what it spent; nothing of it is run."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import plain
from fedllm.dashboard.shelf import Place
from fedllm.dashboard.spent import Spent
from fedllm.dashboard.tail import Odd, Tail, read_small
from fedllm.federation.operate import HELD
from fedllm.runs.folder import RunFolder
from fedllm.runs.sections import OWN
from fedllm.runs.story import Story, real

LOCKS = (".lock", HELD)
TEXT = 200_000
"""Most characters of a recipe that are shown."""


def held(path: Path) -> bool:
    """Whether a living process works on this folder."""
    return any(_plain(path / name) and RunFolder(path).is_held(name) for name in LOCKS)


def _plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


class Watched:
    """A run, stages or a comparison; `look` brings it up to date and says whether anything changed."""

    def __init__(self, place: Place) -> None:
        self.place, self.story, self.tail = place, Story(), Tail(place.path / "events.jsonl")
        self.spent = Spent(place.path)
        self.recipe: dict[str, Any] = {}
        self.text = ""
        self.result: dict[str, Any] = {}
        self.odd: dict[str, str] = {}
        """File -> why it cannot be shown."""
        self.is_held = False
        self.version = 0
        self._seen: dict[str, tuple[int, ...]] = {}

    def look(self) -> bool:
        """Read what is new."""
        before = (self.is_held, self.version)
        self.is_held = held(self.place.path)
        for name, read in (("recipe.yaml", self._recipe), ("result.json", self._result), ("events.jsonl", self._events),
                           ("comparison.json", self._result), ("stages.json", self._result)):
            path = self.place.path / name
            if (now := stamp(path)) == self._seen.get(name, ()) and not (name == "events.jsonl" and self._behind()):
                continue
            self._seen[name] = now
            self.odd.pop(name, None)
            self.version += 1
            if now:
                try:
                    read(path)
                except Odd as why:
                    self.odd[name] = str(why)
        if self.recipe and self.spent.look(self.recipe, self.result):
            self.version += 1
        return (self.is_held, self.version) != before

    def _behind(self) -> bool:
        return "events.jsonl" not in self.odd and self.tail.behind > 1 << 20

    def _recipe(self, path: Path) -> None:
        data = read_small(path, 1 << 22)
        try:
            found = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the safe one, in C
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise Odd(f"recipe.yaml is no YAML: {plain(error)}") from None
        if not isinstance(found, dict):
            raise Odd("recipe.yaml is half written: it holds no recipe")
        self.recipe, self.text = found, data.decode(errors="replace")[:TEXT]

    def _result(self, path: Path) -> None:
        try:
            found = json.loads(read_small(path))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Odd(f"{path.name} is damaged: it is no JSON of a result")
        self.result = found

    def _events(self, path: Path) -> None:
        now = min(time.time(), path.stat().st_mtime)
        for event in self.tail.look():
            if event is None:
                self.story.begin()
            else:
                self.story.take(event, now)

    @property
    def ended(self) -> bool:
        """Whether it came to its end."""
        return any(self._seen.get(n) for n in ("result.json", "comparison.json", "stages.json"))

    @property
    def state(self) -> tuple[str, str]:
        """One word, and why."""
        if self.odd:
            return "damaged", "; ".join(self.odd.values())
        if self.is_held:
            return "running", ""
        if self.ended:
            why = plain(self.result.get("failed") or self.story.nothing)
            return ("failed", why) if why else ("finished", plain(self.result.get("ended") or ""))
        if self.place.kind == "":
            return "half written", "it has no recipe.yaml: the run was ended while its folder was being made"
        if self.place.kind == "run" and not self._seen.get("events.jsonl"):
            return "half written", "it has a recipe and no events yet: nothing had begun when it ended"
        return "stopped", self.story.stopped or "no process works on it"

    def short(self) -> dict[str, Any]:
        """Its line in the list."""
        state, why = self.state
        name, method = self.recipe.get("name"), self.recipe.get("method")
        return {**{k: v for k, v in asdict(self.place).items() if k != "path"}, "path": str(self.place.path),
                "name": plain(name or self.place.path.name, 120), "state": state, "why": why,
                "method": plain(_named(method), 60), "rounds": int(real(self.recipe.get("rounds")) or 0),
                "epsilon": self.spent.epsilon, "of_sites": self.of_sites, **self.story.short()}

    @property
    def of_sites(self) -> bool:
        """Whether this is a run of a real federation."""
        data = self.recipe.get("data")
        return isinstance(data, Mapping) and data.get("source") == OWN

    def whole(self) -> dict[str, Any]:
        """Its page."""
        kept = {k: self.recipe.get(k) for k in ("model", "space", "engine", "seed")}
        return {**self.short(), **self.story.whole(), "recipe": self.text, "privacy": self.spent.as_json(),
                "facts": {k: plain(_named(v), 80) for k, v in kept.items() if v is not None},
                "per_round": real(_at(self.recipe, "clients", "per_round")),
                "reading": self.tail.behind if self._behind() else 0, "says": self._says()}

    def _says(self) -> list[str]:
        """The sentences of a finished comparison."""
        tables = self.result.get("tables")
        return [plain(f"{t.get('setting') or ''} {t.get('says') or ''}".strip(), 1200) for t in
                (tables if isinstance(tables, list) else ())[:40] if isinstance(t, dict)]


def _named(value: Any) -> Any:
    """The name of a part of a recipe, which may have knobs beside it."""
    if isinstance(value, Mapping):
        return value.get("name") or value.get("kind") or ""
    return "" if value is None else value


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value

"""What the gate let go and kept back in a run, or at a site: who, what, why, by which rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import RunError
from fedllm.runs.folder import RunFolder

BOOK = "gate.jsonl"
"""A site's own verdicts, in its store."""
MARKS = ("the gate:", "without a verdict", "the gate's verdict", "its gate has", "its verdict does not say")
"""How a reason reads where it is the gate's."""


@dataclass(frozen=True)
class Piece:
    """One text that was looked at."""

    round: int | None
    client: str
    phase: str
    key: str
    sha: str
    done: str
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Compliance:
    """All verdicts on record."""

    of: str
    pieces: list[Piece] = field(default_factory=list)
    whole: list[Mapping[str, Any]] = field(default_factory=list)
    """Replies that did not leave or were not taken: round, client, phase, why."""
    rules: tuple[str, ...] = ()
    """Digests of the rules that were in force."""
    demands: Mapping[str, Any] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    """Phases whose replies held text and had no gate."""

    def lines(self) -> list[tuple[str, str, str, str, int]]:
        """(client, phase and part, what was done, rule, how often), the gravest first."""
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for p in self.pieces:
            for rule in p.rules or ("-",):
                counts[p.client, f"{p.phase}/{p.key}", p.done, rule] += 1
        order = {name: -i for i, name in enumerate(("pass", "report", "redact", "blank", "withhold"))}
        return [(*k, n) for k, n in sorted(counts.items(), key=lambda kn: (order[kn[0][2]], kn[0]))]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"of": self.of, "demands": dict(self.demands), "rules": list(self.rules),
                "lines": [dict(zip(("client", "part", "done", "rule", "count"), x, strict=True)) for x in self.lines()],
                "pieces": [vars(p) | {"rules": list(p.rules)} for p in self.pieces],
                "replies": [dict(x) for x in self.whole], "without_a_gate": list(self.silent)}


def compliance(path: Path) -> Compliance:
    """The verdicts in a run's folder, or in a site's store; RunError where there is neither."""
    if (path / BOOK).is_file():
        return Compliance(str(path), list(_book(path / BOOK)))
    return _run(RunFolder.open(path))


def _book(file: Path) -> Iterator[Piece]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            told = json.loads(line)
            for key, _, sha, done, rules in told["items"]:
                yield Piece(None, f"this site, run {told['run'][:8]}", told["phase"], key, sha, done, tuple(rules))
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{file}, line {number}: it is no entry of the gate's book") from None


def _run(folder: RunFolder) -> Compliance:
    layers = yaml.safe_load((folder.path / "recipe.yaml").read_text()).get("layers") or ()
    demands = next((layer for layer in layers if layer["name"] == "responsible_gate"), {})
    pieces, whole, rules, silent = list[Piece](), [], dict[str, None](), dict[str, None]()
    for event in folder.events(lambda e: e["kind"] in ("round", "missing", "refused", "wire")):
        if event["kind"] == "round":
            rules |= dict.fromkeys([event["gate_rules"]] if "gate_rules" in event else [])
            pieces += [Piece(event["round"], client, phase, key, sha, done, tuple(why))
                       for client, phase, key, _, sha, done, why in event.get("gate", ())]
        elif event["kind"] == "wire":
            if event["direction"] == "up" and "text" in (event.get("clear") or "").split(", "):
                silent[event["phase"]] = None
        elif any(mark in event["why"] for mark in MARKS):
            whole.append({k: event.get(k) for k in ("round", "client", "phase", "why")})
    judged = {p.phase for p in pieces}
    bare = tuple(phase for phase in silent if phase not in judged)
    return Compliance(str(folder.path), pieces, whole, tuple(rules), demands, bare)

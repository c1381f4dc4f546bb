"""What the gate let go and kept back in a run, or at a site: who, what, why, by which rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import PayloadError, RunError
from fedllm.gate.verdict import Verdict
from fedllm.runs.folder import QUESTIONS, RunFolder

BOOK = "gate.jsonl"
"""A site's own verdicts, in its store."""
MARKS = ("the gate:", "without a verdict", "the gate's verdict", "its gate has", "its verdict does not say")
"""How a reason reads where it is the gate's."""


@dataclass(frozen=True)
class Piece:
    """One text that was looked at."""

    round: int | None
    """None: of a question, or in a site's own book."""
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
    """The verdicts in a run's folder, or in a site's store; RunError where there is neither, or what cannot be read."""
    if (path / BOOK).is_file():
        return _book(path / BOOK)
    folder = RunFolder.open(path)
    try:
        return _run(folder)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: its record is none that a run has written ({type(error).__name__}: {error})"[:400]
                       ) from None


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Each line's number and what it says; None where it is no JSON object (a process that was killed as it wrote)."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        yield number, told if isinstance(told, dict) else None


def _book(file: Path) -> Compliance:
    """A site's own; what cannot be read of it is named, and hides no other line."""
    pieces, whole = list[Piece](), list[Mapping[str, Any]]()
    for number, told in _lines(file):
        try:
            who, phase = f"this site, run {told['run'][:8]}", told["phase"]  # type: ignore[index]
            pieces += [Piece(None, who, str(phase), v.key, v.sha, v.done, v.rules)
                       for v in map(Verdict.of, told["items"])]  # type: ignore[index]
        except (PayloadError, KeyError, TypeError):
            whole.append({"round": None, "client": "this site", "phase": f"line {number}", "why":
                          "it is no entry of the gate's book (a process that was killed as it wrote leaves one)"})
    return Compliance(str(file.parent), pieces, whole)


def _run(folder: RunFolder) -> Compliance:
    layers = yaml.safe_load((folder.path / "recipe.yaml").read_text(encoding="utf-8")).get("layers") or ()
    demands = next((layer for layer in layers if layer["name"] == "responsible_gate"), {})
    pieces, whole, rules, silent = list[Piece](), [], dict[str, None](), dict[str, None]()
    for event in folder.events(lambda e: e["kind"] in ("round", "missing", "refused", "wire")):
        if event["kind"] == "round":
            rules |= dict.fromkeys([event["gate_rules"]] if "gate_rules" in event else [])
            pieces += _judged(event, event["round"])
        elif event["kind"] == "wire":
            if event["direction"] == "up" and "text" in (event.get("clear") or "").split(", "):
                silent[event["phase"]] = None
        elif any(mark in event["why"] for mark in MARKS):
            whole.append({k: event.get(k) for k in ("round", "client", "phase", "why")})
    for _, asked in _lines(folder.path / QUESTIONS) if (folder.path / QUESTIONS).is_file() else ():
        said = asked or {}
        rules |= dict.fromkeys([said["gate_rules"]] if "gate_rules" in said else [])
        pieces += _judged(said, None)
        whole += [{"round": None, "client": client, "phase": "a question", "why": why}
                  for client, why in said.get("missing", {}).items() if any(mark in why for mark in MARKS)]
    judged = {p.phase for p in pieces}
    bare = tuple(phase for phase in silent if phase not in judged)
    return Compliance(str(folder.path), pieces, whole, tuple(rules), demands, bare)


def _judged(event: Mapping[str, Any], round: int | None) -> list[Piece]:
    return [Piece(round, client, phase, key, sha, done, tuple(why))
            for client, phase, key, _, sha, done, why in event.get("gate", ())]

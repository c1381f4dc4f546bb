"""Evidence: whether a run's record is what the run wrote, line by line and file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.runs.event_log import CHAIN, link
from fedllm.runs.folder import RunFolder
from fedllm.runs.store import read_json

SEALED = ("recipe.yaml", "clients.json", "samples.json", "adapter", "model", "trainables", "clients")
"""What a finished run's last event holds the hashes of, where it is there."""
FIGURES = ("state_digest", "method", "rounds", "seed", "evaluation", "bytes", "privacy", "skipped")
"""What of `result.json` the last event holds the hash of."""


@dataclass(frozen=True)
class Verified:
    """What an audit of a run's record found."""

    events: int
    head: str
    """Hash of the last line: whoever keeps it elsewhere can later tell that nothing was changed."""
    finished: bool
    findings: list[str] = field(default_factory=list)
    """One sentence for each thing that is not as the run wrote it."""

    @property
    def intact(self) -> bool:
        """Whether all is as the run wrote it."""
        return not self.findings


def verify(path: str | Path) -> Verified:
    """Check every line of `events.jsonl` against the one before it, and the ends against what holds them.

    A finished run's head is in `result.json`, and its last event seals recipe, clients, model and figures. Of a run
    that is not finished the chain up to its newest checkpoint is held there. Whoever can write all of these files can
    forge them together: keep the head elsewhere (print it, sign it, send it to the others).
    """
    folder = RunFolder.open(Path(path))
    log = folder.path / "events.jsonl"
    if not log.is_file():
        raise RunError(f"{folder.path} has no events.jsonl, so there is nothing to verify")
    data = log.read_bytes()
    lines = data.decode(errors="replace").split("\n")
    cut = lines.pop()
    findings, heads, last = _broken(lines)
    done = folder.path / "result.json"
    if done.is_file():
        findings += [f"events.jsonl ends in half a line: {cut[:60]!r}"] if cut else []
        findings += _against_result(read_json(done), heads, last)
        if last.get("kind") == "finished":
            findings += _against_seal(folder.path, last)
    elif found := folder.load():
        findings += _against_checkpoint(found[1], data, heads)
    return Verified(len(lines), heads[-1] if heads else "", done.is_file(), findings)


def _broken(lines: Iterable[str]) -> tuple[list[str], list[str], Mapping[str, Any]]:
    """Lines that do not follow from the one before them; the hash that stands in each; the last event."""
    findings, heads, before, event = [], [], "", {}
    for number, line in enumerate(lines, 1):
        body, mark, said = line.rpartition(CHAIN)
        body, said = body + "}", said.removesuffix('"}')
        try:
            event = json.loads(body) if mark else {}
        except ValueError:
            mark = ""
        if not mark:
            findings.append(f"line {number} is no event of a chain")
        elif link(before, body) != said:
            findings.append(f"line {number} ({event.get('kind')}) does not follow from line {number - 1}: it was "
                            "edited, or lines were dropped, added or moved")
        before = said if mark else before
        heads.append(before)
    return findings, heads, event


def _against_result(result: Mapping[str, Any], heads: list[str], last: Mapping[str, Any]) -> list[str]:
    held = result.get("audit") if isinstance(result, Mapping) else None
    if not isinstance(held, Mapping) or not held.keys() >= {"events", "head"}:
        return ["result.json holds no head of the chain (written before there was one, or taken out)"]
    out = []
    if held["events"] != len(heads):
        out.append(f"events.jsonl has {len(heads)} lines and result.json says {held['events']}")
    if not heads or held["head"] != heads[-1]:
        out.append("the last line of events.jsonl has another hash than the head in result.json")
    if last.get("kind") == "finished" and last.get("figures") != figures_digest(result):
        out.append(f"result.json was edited: {', '.join(FIGURES)} are not what the last event holds the hash of")
    return out


def _against_seal(path: Path, last: Mapping[str, Any]) -> list[str]:
    now, then = sealed(path), last.get("sealed", {})
    return [f"{name} {'is missing' if name not in now else 'was changed'} since the run ended"
            for name, was in then.items() if now.get(name) != was] + [
        f"{name} was added since the run ended" for name in now if name not in then]


def _against_checkpoint(kept: Mapping[str, Any], data: bytes, heads: list[str]) -> list[str]:
    """The part of the log that the newest checkpoint stands on."""
    size, head = kept.get("events", 0), kept.get("chain")
    count = data[:size].count(b"\n")
    if head is None:
        return []
    if len(data) < size or (heads[count - 1] if count else "") != head:
        return ["events.jsonl is not what the newest checkpoint stands on"]
    return []


def sealed(path: Path) -> dict[str, str]:
    """sha256 of each of the files and folders that a run's end seals."""
    return {name: _digest(path / name) for name in SEALED if (path / name).exists()}


def figures_digest(result: Mapping[str, Any]) -> str:
    """sha256 over the figures of `result.json`, as JSON with sorted keys."""
    text = json.dumps({k: result.get(k) for k in FIGURES}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    h = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        h.update(f"{file.relative_to(path).as_posix()}|{_digest(file)}|".encode())
    return h.hexdigest()

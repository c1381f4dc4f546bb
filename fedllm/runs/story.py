"""What a run's events come to, kept up to date: curves, clients, bytes, trouble."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedllm.core.errors import plain
from fedllm.core.record import is_test

POINTS, CLIENTS, NEWS = 600, 400, 200
"""Most points of a curve, clients, and lines of what happened that a page is sent."""
SILENT = ("wire", "round", "answered", "clock", "evaluation")
"""Kinds of events that are counted and not listed."""
GOOD = ("finished", "resumed", "back", "reopened", "kept_best")
"""Kinds that are listed and are no trouble."""
HEALTH = {"suspect": "suspect", "left_out": "left out", "missing": "missing", "refused": "refused", "back": "here",
          "reopened": "here", "unfinished": "unfinished"}
"""How a client stands after an event of this kind."""


@dataclass
class Client:
    """One client or site, as the record tells of it."""

    state: str = "not asked yet"
    why: str = ""
    asked: int = 0
    answered: int = 0
    missing: int = 0
    refused: int = 0
    up: int = 0
    down: int = 0
    last: int | None = None
    """The last round in which it was asked or answered, from 1."""
    since: float | None = None
    """When it was seen to be asked (seconds since 1970), while its answer is out."""


class Story:
    """A run's events, summed up as they come."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing is known."""
        self.rounds: dict[int, dict[str, Any]] = {}
        self.tests: dict[int, dict[str, float]] = {}
        self.clients: dict[str, Client] = {}
        self.bytes, self.tested = Counter[str](), Counter[str]()
        self.news: deque[dict[str, Any]] = deque(maxlen=NEWS)
        self.trouble = self.resumed = 0
        self.at: int | None = None
        """The round at work, from 0."""
        self.stopped = self.nothing = ""

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """Take in one event that was seen `now` (seconds since 1970; events hold no time)."""
        kind = str(event.get("kind"))
        if kind == "wire":
            self._wire(event, now)
        elif kind == "round":
            self._round(event)
        elif kind == "evaluation":
            self.tests[whole(event.get("round"))] = figures(event.get("global"))
        elif kind in HEALTH and "client" in event:
            self._health(kind, event)
        if kind not in SILENT:
            self._note(kind, event)

    def _wire(self, event: Mapping[str, Any], now: float) -> None:
        way, size = str(event.get("direction")), whole(event.get("bytes"))
        if is_test(str(event.get("phase")), event.get("purpose")):
            self.tested[way] += size
            return
        self.bytes[way] += size
        client, self.at = self._client(event), whole(event.get("round"))
        client.last = self.at + 1
        if way == "down":
            client.asked, client.down, client.state, client.since = client.asked + 1, client.down + size, "asked", now
        else:
            client.answered, client.up = client.answered + 1, client.up + size
            client.state, client.why, client.since = "answered", "", None

    def _client(self, event: Mapping[str, Any]) -> Client:
        return self.clients.setdefault(plain(event.get("client"), 120), Client())

    def _round(self, event: Mapping[str, Any]) -> None:
        number = whole(event.get("round"))
        skipped = plain(event["skipped"]) if "skipped" in event else ""
        self.rounds[number] = {"loss": real(event.get("loss")), "seconds": real(event.get("seconds")),
                               "up": self.bytes["up"], "down": self.bytes["down"], "skipped": skipped}
        self.stopped = ""
        for client in self.clients.values():  # whose answer counted in no way is late, whatever comes of it
            if client.state == "asked":
                client.state, client.why = "no answer", f"round {number + 1} ended without its answer"
            client.since = None
        if skipped:
            self.trouble += 1
            self.news.append({"round": number + 1, "kind": "round skipped", "client": "", "why": skipped, "bad": True})

    def _health(self, kind: str, event: Mapping[str, Any]) -> None:
        client = self._client(event)
        client.state, client.why, client.since = HEALTH[kind], plain(event.get("why", "")), None
        client.missing += kind == "missing"
        client.refused += kind == "refused"

    def _note(self, kind: str, event: Mapping[str, Any]) -> None:
        bad = kind not in GOOD and kind != "caution"
        self.trouble += bad
        self.resumed += kind == "resumed"
        self.stopped = plain(event.get("why", "")) if kind == "stopped" else "" if kind == "resumed" else self.stopped
        self.nothing = plain(event.get("why", "")) if kind == "did_nothing" else self.nothing
        at = event.get("round")
        self.news.append({"round": None if at is None else whole(at) + 1, "kind": plain(kind.replace("_", " "), 60),
                          "client": plain(event.get("client", ""), 120), "why": plain(event.get("why", ""), 600),
                          "bad": bad})

    @property
    def done(self) -> int:
        """Rounds that are done."""
        return max(self.rounds, default=-1) + 1

    def short(self) -> dict[str, Any]:
        """What a list of runs shows."""
        last = next((r["loss"] for _, r in sorted(self.rounds.items(), reverse=True) if r["loss"] is not None), None)
        tests = self.tests[max(self.tests)] if self.tests else {}
        return {"done": self.done, "loss": last, "test": tests, "up": self.bytes["up"], "down": self.bytes["down"],
                "trouble": self.trouble}

    def whole(self) -> dict[str, Any]:
        """What a run's page shows."""
        ranked = sorted(self.clients.items(), key=lambda c: (c[1].state in ("answered", "not asked yet"), c[0]))
        seconds = [r["seconds"] for r in self.rounds.values() if r["seconds"] is not None]
        return {**self.short(), "skipped": sum(bool(r["skipped"]) for r in self.rounds.values()),
                "resumed": self.resumed, "at": self.at, "tested": dict(self.tested), "now": time.time(),
                "seconds": sum(seconds), "round_seconds": seconds[-1] if seconds else None,
                "curve": thinned([{"round": n + 1, **r} for n, r in sorted(self.rounds.items())]),
                "tests": thinned([{"round": n, **f} for n, f in sorted(self.tests.items())]),
                "clients": [{"id": name, **asdict(c)} for name, c in ranked[:CLIENTS]],
                "clients_in_all": len(ranked), "news": list(reversed(self.news))}


def thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most POINTS of them, evenly, the last always."""
    step = -(-len(points) // POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def figures(found: Any) -> dict[str, float]:
    """The numbers of a test, apart from how many rows it had."""
    named = found.items() if isinstance(found, Mapping) else ()
    return {plain(n, 60): v for n, x in named if n != "n" and (v := real(x)) is not None}


def real(value: Any) -> float | None:
    """A number that JSON can hold; None for anything else, infinities and NaN too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def whole(value: Any) -> int:
    """A whole number; 0 for anything else."""
    return int(real(value) or 0)

"""Progress: one way to tell where a run stands, shown as lines in a log, as JSON, or on a terminal (`terminal.py`)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import IO, Any

from fedllm.core.record import Event

log = logging.getLogger("fedllm.progress")


EVERY = 20.0
"""Seconds between two lines inside of a round."""


class Quiet:
    """Shows nothing. What a run tells of its way; every display of one is told the same."""

    def rounds(self, total: int, done: int) -> None:
        """The run begins (or goes on after `done` rounds)."""

    def round(self, number: int, cohort: int, steps: float = 0.0) -> None:
        """A round begins with so many clients, which are expected to make so many training steps in all."""

    def saw(self, event: Event) -> None:
        """Something was recorded."""

    def worked(self, steps: int, tokens: int) -> None:
        """So many clients made a training step, on so many tokens together."""

    def round_done(self, facts: Mapping[str, Any]) -> None:
        """A round ended."""

    def tested(self, round: int, figures: Mapping[str, Any] | None) -> None:
        """The global test after so many rounds told this."""

    def note(self, text: str) -> None:
        """What the run is doing now."""

    def baseline(self, name: str, done: int, total: int) -> None:
        """A baseline has done so many of its rounds."""


class Standing(Quiet):
    """Where a run stands: what the displays that show something have in common."""

    def __init__(self) -> None:
        self.total = self.done = self.first = self.cohort = self.steps = self.tokens = 0
        self.number = -1
        self.expected = 0.0
        self.answered: set[str] = set()
        self.refused: set[str] = set()
        self.began = self.since = time.monotonic()

    def rounds(self, total: int, done: int) -> None:
        self.total, self.done, self.first, self.began = total, done, done, time.monotonic()

    def round(self, number: int, cohort: int, steps: float = 0.0) -> None:
        self.number, self.cohort, self.expected = number, cohort, steps
        self.steps = self.tokens = 0
        self.answered, self.refused, self.since = set(), set(), time.monotonic()
        if number == self.first:
            self.began = self.since  # a test, or waiting for sites, is no part of the pace

    def saw(self, event: Event) -> None:
        if event["kind"] == "wire" and event.get("direction") == "up" and event.get("purpose") is None:
            self.answered.add(event["client"])
            self.refused.discard(event["client"])
        elif event["kind"] in ("missing", "refused") and event["client"] not in self.answered:
            self.refused.add(event["client"])

    def worked(self, steps: int, tokens: int) -> None:
        self.steps, self.tokens = self.steps + steps, self.tokens + tokens

    def round_done(self, facts: Mapping[str, Any]) -> None:
        self.done = self.number + 1
        self.cohort = len(facts.get("cohort") or ()) or self.cohort

    @property
    def speed(self) -> float | None:
        """Tokens a second that were trained on in this round; None where none were seen."""
        spent = time.monotonic() - self.since
        return self.tokens / spent if self.tokens and spent > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that are left at the pace so far; None before the first round has ended."""
        going = min(0.99, self.steps / self.expected) if self.expected and self.number >= self.done else 0.0
        made = self.done - self.first + going
        if self.done <= self.first or self.total <= self.done:
            return None
        return (time.monotonic() - self.began) / made * max(0.0, self.total - self.done - going)

    def stand(self) -> list[str]:
        """How the round stands, in words."""
        step = f"step {self.steps} of about {self.expected:.0f}" if self.steps and self.expected else ""
        clients = f"{len(self.answered)} of {self.cohort} clients answered" if self.cohort else ""
        gone = f"{len(self.refused)} missing" if self.refused else ""
        speed = f"{self.speed:,.0f} tokens/s" if self.speed else ""
        return [part for part in (step, clients, gone, speed) if part]


class Ticking(Standing):
    """A display that also says, every so many seconds inside of a round, how the round stands."""

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        self.every, self.said = every, time.monotonic()

    def meanwhile(self) -> None:
        """Say how the round stands, and note in `said` when that was."""

    def saw(self, event: Event) -> None:
        super().saw(event)
        self._tick()

    def worked(self, steps: int, tokens: int) -> None:
        super().worked(steps, tokens)
        self._tick()

    def _tick(self) -> None:
        if time.monotonic() - self.said >= self.every and self.done <= self.number:
            self.meanwhile()


class Lines(Ticking):
    """A line for each thing that is done, and every so many seconds inside of a round, to the log `fedllm.progress`."""

    def round(self, number: int, cohort: int, steps: float = 0.0) -> None:
        super().round(number, cohort, steps)
        if number == self.first:
            self._say(f"round {number + 1} of {self.total} begins with {cohort} clients")

    def meanwhile(self) -> None:
        self._say(f"round {self.number + 1} of {self.total}: {', '.join(self.stand())}", clock(self.left))

    def round_done(self, facts: Mapping[str, Any]) -> None:
        super().round_done(facts)
        says = [w for w in self.stand() if not w.startswith("step")]
        self._say(f"round {self.done} of {self.total} is done", told(facts), ", ".join(says), clock(self.left))

    def tested(self, round: int, figures: Mapping[str, Any] | None) -> None:
        if shown := figures_in(figures):
            self._say(f"test after round {round}: " + ", ".join(f"{n.replace('_', ' ')} {v:.3f}" for n, v in shown))

    def note(self, text: str) -> None:
        self._say(text)

    def baseline(self, name: str, done: int, total: int) -> None:
        if done in (1, total):
            self._say(f"baseline {name}: round {done} of {total} is done")

    def _say(self, *parts: str) -> None:
        self.said = time.monotonic()
        log.info("%s", "; ".join(part for part in parts if part))


class JsonLines(Ticking):
    """One JSON object a line for a program to read; `docs/reference/progress.md` says what is in it."""

    def __init__(self, out: IO[str], every: float = 1.0) -> None:
        super().__init__(every)
        self.out = out

    def put(self, event: str, **fields: Any) -> None:
        """Write one line."""
        self.said = time.monotonic()
        self.out.write(json.dumps({"event": event, **fields}, default=str) + "\n")
        self.out.flush()

    def rounds(self, total: int, done: int) -> None:
        super().rounds(total, done)
        self.put("begin", rounds=total, done=done)

    def meanwhile(self) -> None:
        self.put("progress", **self._standing())

    def _standing(self) -> dict[str, Any]:
        return {"round": self.number + 1, "of": self.total, "steps": self.steps, "steps_expected": self.expected,
                "clients": self.cohort, "answered": len(self.answered), "missing": len(self.refused),
                "tokens_per_second": self.speed, "seconds_left": self.left}

    def round_done(self, facts: Mapping[str, Any]) -> None:
        super().round_done(facts)
        self.put("round", **self._standing(), loss=facts.get("loss"), seconds=facts.get("seconds"),
                 skipped=facts.get("skipped"))

    def tested(self, round: int, figures: Mapping[str, Any] | None) -> None:
        self.put("test", round=round, figures=dict(figures_in(figures)))

    def note(self, text: str) -> None:
        self.put("note", text=text)

    def baseline(self, name: str, done: int, total: int) -> None:
        self.put("baseline", name=name, done=done, of=total)


def figures_in(figures: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    """What of a test is a number, apart from how many rows it had."""
    return [(n, float(v)) for n, v in (figures or {}).items() if n != "n" and isinstance(v, int | float)]


def told(facts: Mapping[str, Any]) -> str:
    """What is said of a round that ended."""
    loss = facts.get("loss")
    return f"skipped: {facts['skipped']}" if "skipped" in facts else f"training loss {loss:.3f}" if loss else ""


def clock(seconds: float | None) -> str:
    """`1:02:03 left`; nothing where it is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"


def size(count: float) -> str:
    """Bytes in the unit that gives a short number."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

"""Progress: bars for rounds and clients where a terminal is attached, and lines in a log otherwise."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fedllm.core.record import Event

log = logging.getLogger("fedllm.progress")


class Quiet:
    """Shows nothing."""

    def rounds(self, total: int, done: int) -> None:
        """The run begins (or goes on after `done` rounds)."""

    def round(self, number: int, cohort: int) -> None:
        """A round begins."""

    def saw(self, event: Event) -> None:
        """Something was recorded."""

    def round_done(self, facts: dict[str, Any]) -> None:
        """A round ended."""

    def note(self, text: str) -> None:
        """What the run is doing now."""

    def baseline(self, name: str, done: int, total: int) -> None:
        """A baseline has done so many of its rounds."""


class Bars(Quiet):
    """Two bars: rounds of the run, and clients that have answered in this round."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.outer = bars.add_task("rounds", total=None, note="")
        self.inner = bars.add_task("clients", total=None, note="", visible=False)
        self.seen: set[str] = set()
        self.extra: dict[str, Any] = {}

    def rounds(self, total: int, done: int) -> None:
        self.bars.reset(self.outer, total=total, completed=done, first=done)

    def round(self, number: int, cohort: int) -> None:
        self.seen = set()
        self.bars.reset(self.inner, total=cohort, description="clients", visible=True)

    def saw(self, event: Event) -> None:
        answered = event["kind"] in ("wire", "missing") and event.get("direction") != "down"
        if answered and event["client"] not in self.seen:
            self.seen.add(event["client"])
            self.bars.update(self.inner, completed=len(self.seen))

    def round_done(self, facts: dict[str, Any]) -> None:
        self.bars.update(self.outer, advance=1, note=told(facts))

    def note(self, text: str) -> None:
        self.bars.update(self.inner, visible=False)
        self.bars.update(self.outer, note=text)

    def baseline(self, name: str, done: int, total: int) -> None:
        if name not in self.extra:
            self.extra[name] = self.bars.add_task(name, total=total, note="baseline")
        self.bars.update(self.extra[name], completed=done)


class Lines(Quiet):
    """A line for each thing that is done, with the time that is left, to the log `fedllm.progress`."""

    def __init__(self) -> None:
        self.total = self.done = self.first = 0
        self.began = time.monotonic()

    def rounds(self, total: int, done: int) -> None:
        self.total, self.done, self.first, self.began = total, done, done, time.monotonic()

    def round(self, number: int, cohort: int) -> None:
        if number == self.first:
            log.info("round %d of %d begins with up to %d clients", number + 1, self.total, cohort)

    def round_done(self, facts: dict[str, Any]) -> None:
        self.done += 1
        text = f"; {why}" if (why := told(facts)) else ""
        left = seconds_left(time.monotonic() - self.began, self.done - self.first, self.total - self.done)
        log.info("round %d of %d is done%s%s", self.done, self.total, text, f"; {left} left" if left else "")

    def note(self, text: str) -> None:
        log.info(text)

    def baseline(self, name: str, done: int, total: int) -> None:
        if done in (1, total):
            log.info("baseline %s: round %d of %d is done", name, done, total)


def told(facts: Mapping[str, Any]) -> str:
    """What is said of a round that ended."""
    loss = facts.get("loss")
    return f"skipped: {facts['skipped']}" if "skipped" in facts else f"training loss {loss:.3f}" if loss else ""


def seconds_left(spent: float, done: float, left: float) -> str:
    """What is left at this pace, as `1:02:03`; nothing where nothing is done yet, or nothing left."""
    if done <= 0 or left <= 0:
        return ""
    minutes, seconds = divmod(round(spent / done * left), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Left(ProgressColumn):
    """The time left, from the first round on, by the mean pace of those done here."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields.get("first", 0)
        left = seconds_left(task.elapsed or 0.0, done, (task.total or 0) - task.completed)
        return Text(f"{left} left" if left else "", style="progress.remaining")


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Quiet]:
    """Bars on a terminal, `Lines` elsewhere."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = [TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               Left(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bars(bars)

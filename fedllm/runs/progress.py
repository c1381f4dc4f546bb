"""Progress bars for rounds and clients where a terminal is attached, and nothing otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedllm.core.record import Event


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
        self.bars.update(self.outer, total=total, completed=done)

    def round(self, number: int, cohort: int) -> None:
        self.seen = set()
        self.bars.reset(self.inner, total=cohort, description="clients", visible=True)

    def saw(self, event: Event) -> None:
        answered = event["kind"] in ("wire", "missing") and event.get("direction") != "down"
        if answered and event["client"] not in self.seen:
            self.seen.add(event["client"])
            self.bars.update(self.inner, completed=len(self.seen))

    def round_done(self, facts: dict[str, Any]) -> None:
        loss = facts.get("loss")
        text = "skipped: too few answers" if "skipped" in facts else f"training loss {loss:.3f}" if loss else ""
        self.bars.update(self.outer, advance=1, note=text)

    def note(self, text: str) -> None:
        self.bars.update(self.inner, visible=False)
        self.bars.update(self.outer, note=text)

    def baseline(self, name: str, done: int, total: int) -> None:
        if name not in self.extra:
            self.extra[name] = self.bars.add_task(name, total=total, note="baseline")
        self.bars.update(self.extra[name], completed=done)


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Quiet]:
    """Bars on a terminal, `Quiet` elsewhere."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Quiet()
        return
    columns = [TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bars(bars)

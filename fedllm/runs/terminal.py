"""Where a run stands, on a terminal: two bars, or with `--live` a view of clients, bytes and the loss."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fedllm.core.errors import RecipeError
from fedllm.core.record import Event
from fedllm.runs.progress import Lines, Quiet, Standing, clock, size, told
from fedllm.runs.story import Story

SPARK = "▁▂▃▄▅▆▇█"
COLORS = {"answered": "green", "here": "green", "asked": "cyan", "not asked yet": "dim"}
TOLD = 4
"""Lines of trouble that the live view shows, the newest."""
WIDE = 100
"""Columns of a terminal from which bars are long."""
SHOWN = 12
"""Clients that the live view shows; of more, those whose round needs a look come first."""


class Bars(Standing):
    """Two bars: rounds of the run, and the steps of this round (or, where none are told, its clients)."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self.bars = bars
        self.outer = bars.add_task("rounds", total=None, note="", left=None)
        self.inner = bars.add_task("clients", total=None, note="", left=None, visible=False)
        self.extra: dict[str, Any] = {}

    def rounds(self, total: int, done: int) -> None:
        super().rounds(total, done)
        self.bars.reset(self.outer, total=total, completed=done)

    def round(self, number: int, cohort: int, steps: float = 0.0) -> None:
        super().round(number, cohort, steps)
        if self.done == self.first:
            self.bars.update(self.outer, note="")  # what was said before the first round
        self.bars.reset(self.inner, total=cohort, description=f"round {number + 1}", visible=True)

    def saw(self, event: Event) -> None:
        super().saw(event)
        if event["kind"] in ("wire", "missing", "refused"):
            self._inner()

    def worked(self, steps: int, tokens: int) -> None:
        super().worked(steps, tokens)
        self._inner()

    def _inner(self) -> None:
        total, done = (round(self.expected), self.steps) if self.steps and self.expected else (
            self.cohort, len(self.answered | self.refused))
        says = [w for w in self.stand() if not w.startswith("step")]
        self.bars.update(self.inner, total=max(total, done), completed=done, note=", ".join(says))
        self.bars.update(self.outer, left=self.left)

    def round_done(self, facts: Mapping[str, Any]) -> None:
        super().round_done(facts)
        self.bars.update(self.outer, completed=self.done, note=told(facts), left=self.left)

    def note(self, text: str) -> None:
        self.bars.update(self.inner, visible=False)
        self.bars.update(self.outer, note=text)

    def baseline(self, name: str, done: int, total: int) -> None:
        if name not in self.extra:
            self.extra[name] = self.bars.add_task(name, total=total, note="baseline", left=None)
        self.bars.update(self.extra[name], completed=done)


class LiveView(Standing):
    """Rounds, time left, who answered, bytes, the loss from round to round, and what went wrong, in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.story, self.says, self.born = Story(), "", time.monotonic()
        self.beside: dict[str, tuple[int, int]] = {}

    def saw(self, event: Event) -> None:
        super().saw(event)
        self.story.take(event, time.time())

    def round(self, number: int, cohort: int, steps: float = 0.0) -> None:
        super().round(number, cohort, steps)
        self.says = ""

    def note(self, text: str) -> None:
        self.says = text

    def baseline(self, name: str, done: int, total: int) -> None:
        self.beside[name] = (done, total)

    def __rich__(self) -> RenderableType:
        """The view as it is now."""
        parts: list[RenderableType] = [self._bars()]
        if self.says:
            parts.append(Text(self.says, "dim"))
        losses = [r["loss"] for _, r in sorted(self.story.rounds.items()) if r["loss"] is not None]
        if losses:
            parts.append(Text(f"training loss  {spark(losses)}  {losses[-1]:.3f}"))
        tests = self.story.tests
        parts += [Text(f"test after round {n}  " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in
                                                             tests[n].items() if k != "n"))
                  for n in sorted({min(tests), max(tests)} if tests else ())]
        sent = self.story.bytes
        parts.append(Text(f"{size(sent['up'])} up, {size(sent['down'])} down, {time.monotonic() - self.born:.0f} s"))
        if self.story.clients:
            parts.append(self._clients())
        parts += [Text(" ".join(x for x in (n["client"], n["kind"], n["why"]) if x), "yellow")
                  for n in [n for n in self.story.news if n["bad"]][-TOLD:]]
        return Panel(Group(*parts), title="fedllm", title_align="left", border_style="dim")

    def _bars(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        going = min(1.0, self.steps / self.expected) if self.expected and self.number >= self.done else 0.0
        grid.add_row("rounds", ProgressBar(max(1, self.total), min(self.total, self.done + going), width=40),
                     f"{self.done} of {self.total}", clock(self.left))
        if self.cohort and self.number >= self.done:
            grid.add_row(f"round {self.number + 1}", ProgressBar(max(1, self.cohort), len(self.answered), width=40),
                         ", ".join(self.stand()), "")
        for name, (done, of) in self.beside.items():
            grid.add_row(name, ProgressBar(max(1, of), done, width=40), f"{done} of {of}", "baseline")
        return grid

    def _clients(self) -> RenderableType:
        rank = {"asked": 1, "answered": 2, "here": 2, "not asked yet": 3}
        clients = sorted(self.story.clients.items(), key=lambda c: (rank.get(c[1].state, 0), c[0]))
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("client", "stands", "up", "down", "missed"):
            table.add_column(column, justify="left" if column in ("client", "stands") else "right")
        for name, one in clients[:SHOWN]:
            color = COLORS.get(one.state, "red")
            table.add_row(Text(name), Text(f"{one.state} {one.why}".strip(), color), size(one.up), size(one.down),
                          str(one.missing + one.refused or ""))
        if len(clients) > SHOWN:
            table.add_row(f"and {len(clients) - SHOWN} more", "", "", "", "")
        return table


def spark(values: list[float], most: int = 40) -> str:
    """Numbers as a line of blocks, the last `most` of them."""
    last = values[-most:]
    low, high = min(last), max(last)
    step = (high - low) / (len(SPARK) - 1) or 1.0
    return "".join(SPARK[round((v - low) / step)] for v in last)


class Left(ProgressColumn):
    """The time left of the run, from the first round on."""

    def render(self, task: Task) -> Text:
        return Text(clock(task.fields.get("left")), style="progress.remaining")


class Note(ProgressColumn):
    """What is said beside; where a terminal is narrow it is this that is cut, and no figure."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Quiet]:
    """Bars on a terminal, `Lines` elsewhere."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = [TextColumn("{task.description:>14}"), BarColumn(30 if console.width >= WIDE else 12),
               MofNCompleteColumn(table_column=Column(no_wrap=True)), TimeElapsedColumn(Column(no_wrap=True)),
               Left(Column(no_wrap=True)), Note()]
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bars(bars)


@contextlib.contextmanager
def live_view(console: Console | None = None) -> Iterator[Quiet]:
    """The live view; RecipeError where there is no terminal to draw it on."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        raise RecipeError("--live draws on a terminal, and standard error is none; leave it out (a line for each round "
                          "is told then), or take --json")
    view = LiveView()
    with Live(view, console=console, refresh_per_second=4, transient=False):
        yield view

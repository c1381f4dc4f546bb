"""Virtual time: a fleet with declared speeds, lines and hours is simulated exactly, as quickly as it can be computed.

An answer takes the message's way down, the work that was really done (local steps, counted request by request) at the
client's speed, and the reply's way up. Nothing is measured, so that equal seeds give equal times on every machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedllm.core.ask import Ask, ClientId, Replies
from fedllm.core.client import SERVER, ClientInfo, Fleet
from fedllm.core.payload import Payload
from fedllm.core.program import Fold
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.engines.job import Job
from fedllm.engines.world import World

BOOK = "clock"
"""In the server's own memory, and so in checkpoints: what time it is, and the answers that are under way."""

Gone = str
"""Why there is no reply."""


@dataclass(frozen=True)
class Flight:
    """An answer that is under way."""

    phase: str
    client: ClientId
    begun: float
    lands: float
    tie: float
    """Orders answers that land in the same moment, by a draw of their own."""
    reply: Payload | Gone
    up: int = 0

    def as_state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        reply = self.reply if isinstance(self.reply, Gone) else dict(self.reply)
        return {**{k: getattr(self, k) for k in ("phase", "client", "begun", "lands", "tie", "up")}, "reply": reply}


class Timed(Protocol):
    """What a clock needs of the engine whose time it tells."""

    world: World
    infos: Mapping[ClientId, ClientInfo]
    record: Record
    quorum: float | int
    round: int

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | Gone]]: ...
    def jobs(self, folds: Sequence[Fold], clients: Sequence[ClientId] | None = None) -> Iterator[Job]: ...
    def cross(self, way: str, job: Job, payload: Payload) -> Payload: ...
    def land(self, fold: Fold, client: ClientId, reply: Payload | Gone, seconds: float | None = None) -> None: ...
    def undo(self, client: ClientId) -> None: ...
    def chance(self, job: Job) -> tuple[float, np.random.Generator]: ...
    def loses(self, job: Job, draw: np.random.Generator) -> bool: ...
    def close(self, fold: Fold) -> Replies: ...


@dataclass
class Clock:
    """What time it is, who is at work, and how asks pass in virtual time."""

    engine: Timed
    fleet: Fleet
    now: float = 0.0
    flying: list[Flight] = field(default_factory=list)
    wasted: int = 0
    """Bytes of answers that came too late to count."""
    used: bool = False

    def restore(self, book: Mapping[str, Any] | None) -> None:
        """As it was committed."""
        book = book or {}
        self.now, self.wasted = float(book.get("now", 0.0)), int(book.get("wasted", 0))
        self.flying = [Flight(**f) for f in book.get("flying", ())]

    def book(self) -> dict[str, Any]:
        """What to commit."""
        return {"now": self.now, "wasted": self.wasted, "flying": [f.as_state() for f in self.flying]}

    def end(self) -> None:
        """The run is over: who is still at work is named, and no round is left for those answers."""
        for flight in self.flying:
            self.engine.record.emit("unfinished", round=self.engine.round, phase=flight.phase, client=flight.client,
                                    why="the run ended while it was at work")
        self.flying = []

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        """Answer the asks; they begin now, and the clock goes on to the end of the last of them."""
        self.used = True
        folds = [Fold(ask, self.engine.quorum, rows={c: i.n for c, i in self.engine.infos.items()}) for ask in asks]
        start, ends = self.now, self._together([f for f in folds if f.ask.flight is None])
        for fold in folds:
            if fold.ask.flight is not None:
                self.now = start
                ends = max(ends, self._by_and_by(fold))
        self.now = ends
        self.engine.record.emit("clock", round=self.engine.round, begun=start, seconds=self.now - start,
                                phases=[a.phase for a in asks])
        return [self.engine.close(fold) for fold in folds]

    def _together(self, folds: Sequence[Fold]) -> float:
        """Everybody who is asked begins at once; returns when the last of these asks closes."""
        start, free, ends = self.now, dict[ClientId, float](), {id(f): self.now for f in folds}
        held: dict[int, list[Flight]] = {id(f): [] for f in folds}
        for job, reply in self.engine.answers(self.engine.jobs(folds)):
            fold, flight = job.fold, self._flight(job, reply, free.get(job.client, start))
            free[job.client] = flight.lands
            if fold.ask.enough is None:
                ends[id(fold)] = max(ends[id(fold)], self._close(fold, flight, start, job))
            else:
                held[id(fold)].append(flight)
        for fold in folds:
            if fold.ask.enough is not None:
                ends[id(fold)] = self._first(fold, held[id(fold)], start)
        return max(ends.values(), default=start)

    def _close(self, fold: Fold, flight: Flight, start: float, job: Job | None = None) -> float:
        """Take one answer or leave it, when it is too late; returns the moment from which it is known which."""
        deadline = self._deadline(fold.ask)
        if deadline is not None and flight.lands - start > deadline:
            self._late(fold, flight, f"its deadline of {deadline:g} s passed before it answered, which takes "
                                     f"{flight.lands - start:g} s")
            return start + deadline
        self._take(fold, flight)
        return flight.lands

    def _first(self, fold: Fold, flights: Iterable[Flight], start: float) -> float:
        """Answers in the order in which they land, until enough of them count."""
        end, until = start, math.inf
        for flight in sorted(flights, key=lambda f: (f.lands, f.tie)):
            if fold.full and (fold.ask.grace is None or flight.lands > until):
                end = end if fold.ask.grace is None else until
                self._late(fold, flight, f"{fold.ask.enough} answers were enough, and it came "
                                         f"{flight.lands - end:g} s later")
            else:
                was, end = fold.full, max(end, self._close(fold, flight, start))
                if fold.full and not was and fold.ask.grace is not None:
                    until = end + fold.ask.grace(list(fold.seconds.values()))
        return end

    def _by_and_by(self, fold: Fold) -> float:
        """So many at work at a time; returns when enough answers counted, or nobody is left at work."""
        ask, start, deadline = fold.ask, self.now, self._deadline(fold.ask)
        home = [f for f in self.flying if f.phase != ask.phase]
        flying = [f for f in self.flying if f.phase == ask.phase]
        away = {f.client for f in flying}
        queue = deque(c for c in ask.msgs if c not in away)
        room = len(ask.msgs) + (ask.enough or 0)  # so that a round in which no answer counts ends
        while not fold.full:
            free = max(0, min((ask.flight or 1) - len(flying), len(queue), room))
            room -= free
            flying += self._begin(fold, [queue.popleft() for _ in range(free)])
            if not flying:
                break
            landed = self._next(flying, None if deadline is None else start + deadline)
            if not landed:
                break
            for flight in landed:
                if fold.full:
                    break
                flying.remove(flight)
                self._take(fold, flight)
                if ask.enough is not None and flight.client in ask.msgs and not isinstance(flight.reply, Gone):
                    queue.append(flight.client)
        self.flying = home + flying
        return self.now

    def _next(self, flying: Sequence[Flight], ends: float | None) -> list[Flight]:
        """Who lands next, and who in the same moment, in their order; nobody when none does before time `ends`."""
        lands = min(f.lands for f in flying)
        if ends is not None and lands > ends:
            self.now = ends
            return []
        self.now = max(self.now, lands)
        return sorted((f for f in flying if f.lands <= self.now), key=lambda f: (f.lands, f.tie))

    def _begin(self, fold: Fold, clients: Sequence[ClientId]) -> list[Flight]:
        """Their work is done now, all of it in one wave; when it lands is another matter."""
        jobs = self.engine.jobs([fold], clients)
        return [self._flight(job, reply, self.now) for job, reply in self.engine.answers(jobs)]

    def _flight(self, job: Job, reply: Payload | Gone, begun: float) -> Flight:
        profile, took = self.engine.infos[job.client].profile, job.took
        tie, draw = self.engine.chance(job)
        if isinstance(reply, Gone):  # it did not begin, or keeps its answer to itself
            lands = begun + self.fleet.compute(profile, took.steps)
            return Flight(job.fold.ask.phase, job.client, begun, lands, tie, reply)
        reply = self.engine.cross("up", job, reply)
        seconds = self.fleet.compute(profile, took.steps)
        if job.client != SERVER:
            seconds += self.fleet.travel(profile, took.down) + self.fleet.travel(profile, took.up)
        if self.engine.loses(job, draw):
            after = float(draw.random()) * seconds
            return Flight(job.fold.ask.phase, job.client, begun, begun + after, tie, f"lost after {after:g} s at work")
        return Flight(job.fold.ask.phase, job.client, begun, begun + seconds, tie, reply, took.up)

    def _take(self, fold: Fold, flight: Flight) -> None:
        self.engine.land(fold, flight.client, flight.reply, flight.lands - flight.begun)

    def _late(self, fold: Fold, flight: Flight, why: str) -> None:
        """Its bytes were sent for nothing, and what it noted in its memory does not count."""
        self.wasted += flight.up
        self.engine.undo(flight.client)
        self.engine.land(fold, flight.client, why, flight.lands - flight.begun)

    def asleep(self, client: ClientId) -> bool:
        """Whether it is night at this client: its day begins at an hour of its own."""
        if self.fleet.day_share >= 1 or client == SERVER:
            return False
        hour = numpy_stream(self.engine.world.seed, client, "day").random()
        return (self.now / self.fleet.day_seconds + hour) % 1.0 >= self.fleet.day_share

    def _deadline(self, ask: Ask) -> float | None:
        """Virtual seconds, where the recipe declares a fleet; without one the engine keeps it in real ones."""
        return ask.deadline if self.engine.world.fleet else None

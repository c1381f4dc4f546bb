"""Real time: asks that close by who answers first, and answers that are under way from one round to the next.

What `clock` works out, here happens: the same asks pass in the same way, and the order in which answers land is the
sites' own. So two runs are alike only where that order is (one site, or one at work at a time).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, Protocol

from fedllm.core.ask import Ask, ClientId, Replies
from fedllm.core.client import SERVER, Fleet
from fedllm.core.payload import Payload
from fedllm.core.program import Fold
from fedllm.engines.clock import Clock, Timed
from fedllm.engines.far.sites import Sites
from fedllm.engines.far.trip import Bodies, Trip
from fedllm.engines.job import Job

FORMER = "it was asked before the coordinator was started again, and nobody waits for that answer any longer"
SILENT = "it was silent for longer than any answer may take"
VOID = "the round in which it was asked does not count"


class Far(Timed, Protocol):
    """What a clock that waits needs of the engine: the sites, trips to them, and what is the server's own to do."""

    sites: Sites

    def set_off(self, jobs: Sequence[Job], bodies: Bodies) -> list[Trip]: ...
    def own(self, job: Job) -> Payload | str: ...
    def hear(self) -> None: ...


class RealTime(Clock):
    """A clock that waits; `flying` are trips that are under way, or have landed and are not folded yet."""

    engine: Far
    flying: list[Trip]  # type: ignore[assignment]

    def __init__(self, engine: Far) -> None:
        super().__init__(engine, Fleet())
        self._zero, self._told = time.monotonic(), False
        self._kept: list[Trip] = []  # as they were committed

    def restore(self, book: Mapping[str, Any] | None) -> None:
        """As it was committed, in this process or in one before it, whose answers are lost."""
        book = book or {}
        self._zero -= max(0.0, float(book.get("now", 0.0)) - self._tick())
        for trip in self.flying:
            if trip not in self._kept:
                self._leave(trip, VOID)
        self.flying = list(self._kept)
        lost = [] if self._told else [f for f in book.get("flying", ()) if f["by"] != self.engine.sites.id]
        for was in lost:
            self._told = self.used = True
            self.engine.sites.drop(was["client"], was["attempt"], was["visit"])
            self._missing(was["phase"], was["client"], FORMER)

    def book(self) -> dict[str, Any]:
        """What to commit, and from now on to come back to."""
        self._kept = list(self.flying)
        return {"now": self._tick(), "wasted": self.wasted, "flying": [
            {"phase": t.phase, "client": t.client, "attempt": t.head["attempt"], "visit": t.visit,
             "by": self.engine.sites.id} for t in self.flying]}

    def end(self) -> None:
        for trip in self.flying:
            self._drop(trip)
        super().end()

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        self._bodies = Bodies()
        self._tick()
        return super().send(asks)

    def _together(self, folds: Sequence[Fold]) -> float:
        """All begin at once. What needs all answers is folded in the order of the ask, and so does not depend on time;
        what needs some is folded as they land."""
        trips: dict[int, list[Trip]] = {id(f): [] for f in folds}
        start = self._tick()
        for trip in self._set_off(folds, None):
            trips[id(trip.job.fold)].append(trip)
        for fold in folds:
            mine = trips[id(fold)]
            until: float | None = None
            while mine and (not fold.full or until is not None) and (
                    landed := self._next(mine if fold.ask.enough else mine[:1], until)):
                for trip in landed:
                    if not fold.full or until is not None:
                        mine.remove(trip)
                        self._take(fold, trip)
                if fold.full and until is None and fold.ask.grace is not None:
                    until = self._tick() + fold.ask.grace(list(fold.seconds.values()))
            enough = f"{fold.ask.enough} answers were enough, and it had not come by then"
            for trip in mine:
                self._late(fold, trip, enough if fold.full else SILENT)
        return max(start, self._tick())

    def _begin(self, fold: Fold, clients: Sequence[ClientId]) -> list[Trip]:  # type: ignore[override]
        return self._set_off([Fold(fold.ask)], clients)  # an empty fold: what is under way holds no sums

    def _set_off(self, folds: Sequence[Fold], clients: Sequence[ClientId] | None) -> list[Trip]:
        trips = self.engine.set_off(list(self.engine.jobs(folds, clients)), self._bodies)
        for trip in trips:
            if trip.client == SERVER:
                trip.arrive((self.engine.own(trip.job), 0))
            else:
                self.engine.cross("down", trip.job, trip.job.fold.ask.msgs[trip.client])
        return trips

    def _next(self, flying: Sequence[Trip], ends: float | None) -> list[Trip]:  # type: ignore[override]
        """Who has landed, in their order; waits for the first, to time `ends` at most (a call ends by itself)."""
        patience = self.engine.sites.patience
        limit = patience.answer + 2 * patience.opening if ends is None else max(0.0, ends - self._tick())
        wait([t.answer for t in flying], limit, FIRST_COMPLETED)
        self._tick()
        return sorted((t for t in flying if t.answer.done()), key=lambda t: t.lands)

    def _take(self, fold: Fold, trip: Trip) -> None:  # type: ignore[override]
        reply, sent = trip.answer.result()
        if not trip.booked:  # of a round that failed it may land once more
            trip.booked = True
            for _ in range(sent - 1):
                self.engine.cross("down", trip.job, trip.job.fold.ask.msgs[trip.client])
            if not isinstance(reply, str):
                self.engine.cross("up", trip.job, reply)
        self.engine.land(fold, trip.client, reply, round(trip.lands - trip.begun, 6))

    def _late(self, fold: Fold, trip: Trip, why: str) -> None:  # type: ignore[override]
        self._drop(trip)
        self.engine.land(fold, trip.client, why, round(time.monotonic() - trip.begun, 6))

    def _leave(self, trip: Trip, why: str) -> None:
        self._drop(trip)
        self._missing(trip.phase, trip.client, why)

    def _drop(self, trip: Trip) -> None:
        trip.over.set()
        self.engine.sites.drop(trip.client, str(trip.head["attempt"]), trip.visit)

    def _missing(self, phase: str, client: ClientId, why: str) -> None:
        self.engine.record.emit("missing", round=self.engine.round, phase=phase, client=client, why=why)

    def _deadline(self, ask: Ask) -> float | None:
        return ask.deadline

    def _tick(self) -> float:
        """Seconds of work on this run so far; what was noticed of the sites meanwhile is written down."""
        self.engine.hear()
        self.now = time.monotonic() - self._zero
        return self.now

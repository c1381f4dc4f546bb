"""The engine of a real federation: the same asks as in a simulation, answered by organisations on other machines.

What travels is a small JSON envelope and a payload in the codec's bytes; `federation/` holds what carries both.
Round and visit numbers stand in the envelope, so that a site draws what the same client draws in a simulation.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from fedllm.core.ask import ClientId
from fedllm.core.client import SERVER
from fedllm.core.errors import PayloadError, plain
from fedllm.core.payload import Payload
from fedllm.core.record import Record
from fedllm.engines.carry import carry_out
from fedllm.engines.clock import Clock
from fedllm.engines.far.door import Door
from fedllm.engines.far.line import Body, Head, Silence, Unsent
from fedllm.engines.far.real_time import RealTime
from fedllm.engines.far.reasons import sentence
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.engines.far.trip import Answer, Bodies, Trip
from fedllm.engines.in_process import InProcess
from fedllm.engines.job import Job
from fedllm.engines.world import World
from fedllm.models.kernels import give_back_freed_memory

log = logging.getLogger(__name__)
UNHEARD = "flare.unheard"
"""In the server's own memory, and so in checkpoints: by site, the rounds that counted and of which it has not heard."""

DROPPED = "flare.dropped"
"""The same of visits that do not count."""

TRIM = 20
"""Rounds after which a coordinator hands freed memory back to the system."""


class Flare(InProcess):
    """Asks far sites; the server's own share (`SERVER`) is done here. A client's memory never comes here."""

    def __init__(self, stack: Sequence[Any], world: World, record: Record | None = None, *, sites: Sites,
                 quorum: float | int = 1, loopback: bool = False, door: Door | None = None) -> None:
        """`sites` carries the messages; `loopback` means nothing here, since every message becomes bytes."""
        self.sites = sites
        self._reminded = False
        self.door = door or Door.of(world.model)
        self._heard: deque[tuple[str, dict[str, Any]]] = deque()
        super().__init__(stack, world, record, quorum=quorum)

    def _clock(self) -> Clock:
        return RealTime(self)

    def begin(self, round: int) -> None:
        self.attempt, self._asked = uuid.uuid4().hex, set[ClientId]()
        if self.memory and not self._reminded:  # a resumed run: the process before this one may not have told the sites
            self._reminded = True
            mine = self.memory.get(SERVER, {})
            for site in self.sites.table:
                self.sites.remind(site, mine.get(UNHEARD, {}).get(site, ()), mine.get(DROPPED, {}).get(site, ()))
        super().begin(round)

    def commit(self) -> dict[ClientId, dict[str, Any]]:
        """Sites make their memories permanent when they hear of it; what is given back is the server's own."""
        for site in sorted(self._asked):
            self.sites.settle(site, self.attempt, self.round)
        self._asked.clear()
        if self.round % TRIM == 0:
            give_back_freed_memory()
        touched = super().commit()
        mine = self.memory[SERVER] = touched[SERVER] = dict(self.memory.get(SERVER, {}))
        mine[UNHEARD] = {name: list(site.settled) for name, site in self.sites.table.items() if site.settled}
        mine[DROPPED] = {name: list(site.dropped) for name, site in self.sites.table.items() if site.dropped}
        return touched

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | str]]:
        """All sites work at once, each through its own jobs in order; answers are folded in the order of the ask."""
        todo = list(jobs)
        trips: list[Trip | None] = list(self.set_off(todo, Bodies()))
        for i, job in enumerate(todo):
            trip, trips[i] = trips[i], None  # a folded reply must not be held any longer
            if trip is None or job.client == SERVER:
                yield job, self.own(job)
                continue
            reply, sent = trip.answer.result()
            self.hear()
            for _ in range(sent):
                self.cross("down", job, job.fold.ask.msgs[job.client])
            yield job, reply

    def own(self, job: Job) -> Payload | str:
        """The server's own share of an ask."""
        return self.work(job, lambda request: carry_out([request], self.world.limits)[0])

    def set_off(self, jobs: Sequence[Job], bodies: Bodies) -> list[Trip]:
        """A trip for each job; all sites begin at once, each with its own jobs in order. The server's own stay here."""
        self.sites.on_event = lambda kind, **facts: self._heard.append((kind, facts))  # from the lanes' threads
        trips, lanes = list[Trip](), defaultdict[ClientId, list[Trip]](list)
        for job in jobs:
            trips.append(Trip(job, self._head(job), time.monotonic()))
            if job.client != SERVER:
                self._asked.add(job.client)
                lanes[job.client].append(trips[-1])
        for lane in lanes.values():
            threading.Thread(target=self._walk, args=(lane, bodies), name="flare-lane", daemon=True).start()
        return trips

    def hear(self) -> None:
        """Write down what was noticed of the sites meanwhile."""
        while self._heard:
            kind, facts = self._heard.popleft()
            self.record.emit(kind, round=self.round, **facts)

    def _head(self, job: Job) -> Head:
        ask = job.fold.ask
        return {"op": "ask", "protocol": PROTOCOL, "round": self.round, "visit": job.visit, "phase": ask.phase,
                "attempt": self.attempt, "most": self.door.room(ask.msgs[job.client]),
                "stack": [type(part).__name__ for part in self.stack]}

    def _walk(self, lane: list[Trip], bodies: Bodies) -> None:
        """One site's jobs of one trip, in order (each may read what the one before it left in memory)."""
        while lane:
            trip = lane.pop(0)
            try:
                trip.arrive(self._ask(trip, bodies))
            except BaseException as error:
                trip.fail(error)

    def _ask(self, trip: Trip, bodies: Bodies) -> Answer:
        ask, site = trip.job.fold.ask, trip.client
        msg = ask.msgs[site]
        seconds = ask.deadline if ask.flight is None else None  # who is in flight outlives the ask
        told = bodies.of(msg)
        try:
            head, body, sent = self.sites.ask(site, trip.head, told, seconds, trip.over)
            return self._read(msg, head, body), sent
        except Silence as why:
            if not (trip.over.is_set() or isinstance(why, Unsent)):
                self.sites.drop(site, str(trip.head["attempt"]), trip.visit)  # it may still be at work
            return str(why), 1
        except Exception as error:  # whatever one site answers, the others' answers count
            log.warning("the answer of site '%s' cannot be read", site, exc_info=True)
            return f"its answer cannot be read ({type(error).__name__})", 1

    def _read(self, msg: Payload, head: Head, body: Body) -> Payload | str:
        """The reply, or why it does not count."""
        if "refused" in head:
            return plain(f"refused by the site: {sentence(head['refused'])}")
        if "oversized" in head:
            return plain(f"reply refused: {head['oversized']}")
        try:
            return self.door.enter(msg, body)
        except PayloadError as error:
            return f"reply refused: {error}"

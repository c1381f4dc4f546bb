"""The engine of a real federation: the same asks as in a simulation, answered by organisations on other machines.

What travels is a small JSON envelope and a payload in the codec's bytes; NVFlare carries both (`app/federate_nodes`).
Round and visit numbers stand in the envelope, so that a site draws what the same client draws in a simulation.
"""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from fedllm.core.ask import ClientId
from fedllm.core.errors import PayloadError
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload
from fedllm.core.record import Record
from fedllm.engines.client import RUNNERS
from fedllm.engines.flare_door import Door
from fedllm.engines.flare_sites import PROTOCOL, Body, Head, Silence, Sites
from fedllm.engines.in_process import InProcess, Job
from fedllm.engines.world import GLOBAL, World
from fedllm.wire import codec

Answer = tuple[Payload | str, int]
"""The reply or why there is none, and how often the message was sent."""

UNHEARD = "flare.unheard"
"""In the server's own memory, and so in checkpoints: by site, the rounds that counted and of which it has not heard."""


class Flare(InProcess):
    """Asks far sites; the server's own share (`SERVER`) is done here. A client's memory never comes here."""

    def __init__(self, stack: Sequence[Any], world: World, record: Record | None = None, *, sites: Sites,
                 quorum: float | int = 1, loopback: bool = False, door: Door | None = None) -> None:
        """`sites` carries the messages; `loopback` means nothing here, since every message becomes bytes."""
        self.sites = sites
        self._reminded = False
        self.door = door or Door.of(world.model, coded=any(isinstance(s, Layer) for s in stack[1:]))
        super().__init__(stack, world, record, quorum=quorum)
        self._heard: deque[tuple[str, dict[str, Any]]] = deque()

    def begin(self, round: int) -> None:
        super().begin(round)
        self.attempt, self._asked = uuid.uuid4().hex, set[ClientId]()
        if self.memory and not self._reminded:  # a resumed run: the process before this one may not have told the sites
            self._reminded = True
            for site, told in self.memory.get(GLOBAL, {}).get(UNHEARD, {}).items():
                self.sites.remind(site, told)

    def commit(self) -> dict[ClientId, dict[str, Any]]:
        """Sites make their memories permanent when they hear of it; what is given back is the server's own."""
        for site in sorted(self._asked):
            self.sites.settle(site, self.attempt, self.round)
        self._asked.clear()
        touched = super().commit()
        mine = self.memory[GLOBAL] = touched[GLOBAL] = dict(self.memory.get(GLOBAL, {}))
        mine[UNHEARD] = {name: list(site.settled) for name, site in self.sites.table.items() if site.settled}
        return touched

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | str]]:
        """All sites work at once, each through its own jobs in order; answers are folded in the order of the ask."""
        self.sites.on_event = lambda kind, **facts: self._heard.append((kind, facts))  # from the lanes' threads
        todo, lanes = list(jobs), defaultdict[ClientId, list[tuple[Job, Future[Answer]]]](list)
        futures: list[Future[Answer] | None] = []
        for job in todo:
            future: Future[Answer] | None = None if job.client == GLOBAL else Future()
            futures.append(future)
            if future is not None:
                lanes[job.client].append((job, future))
        bodies = Bodies()
        for lane in lanes.values():
            threading.Thread(target=self._walk, args=(lane, bodies), name="flare-lane", daemon=True).start()
        for i, job in enumerate(todo):
            future, futures[i] = futures[i], None  # a folded reply must not be held any longer
            if future is None:
                yield job, self.work(job, lambda request: RUNNERS[type(request)]([request], self.world.limits)[0])
                continue
            reply, sent = future.result()
            while self._heard:
                kind, facts = self._heard.popleft()
                self.record.emit(kind, round=self.round, **facts)
            for _ in range(sent):
                self._cross("down", job, job.fold.ask.msgs[job.client])
            yield job, reply

    def _walk(self, lane: list[tuple[Job, Future[Answer]]], bodies: Bodies) -> None:
        """One site's jobs of one trip, in order (each may read what the one before it left in memory)."""
        while lane:
            job, future = lane.pop(0)
            try:
                future.set_result(self._ask(job, bodies))
            except BaseException as error:
                future.set_exception(error)

    def _ask(self, job: Job, bodies: Bodies) -> Answer:
        ask = job.fold.ask
        msg = ask.msgs[job.client]
        head = {"op": "ask", "protocol": PROTOCOL, "round": self.round, "visit": job.visit, "phase": ask.phase,
                "attempt": self.attempt, "most": self.door.room(msg),
                "stack": [type(part).__name__ for part in self.stack]}
        self._asked.add(job.client)
        try:
            head_up, body, sent = self.sites.ask(job.client, head, bodies.of(msg), ask.deadline)
        except Silence as why:
            return str(why), 1
        return self._read(msg, head_up, body), sent

    def _read(self, msg: Payload, head: Head, body: Body) -> Payload | str:
        """The reply, or why it does not count."""
        for verdict in ("refused", "failed"):
            if verdict in head:
                return f"{verdict} by the site: {str(head[verdict])[:500]}"
        if "oversized" in head:
            return f"reply refused: {head['oversized']}"
        try:
            return self.door.enter(msg, body)
        except PayloadError as error:
            return f"reply refused: {error}"


class Bodies:
    """Messages as bytes; the same tensors for many clients are encoded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[Any, bytearray] | None = None

    def of(self, msg: Payload) -> bytes | bytearray:
        """The codec's bytes; none for an empty message."""
        if not msg:
            return b""
        key = tuple((k, id(v) if isinstance(v, Tensor) else repr(v)) for k, v in msg.items())
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = (key, codec.encode(msg))
            return self._last[1]

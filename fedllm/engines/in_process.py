"""One client at a time, in this process: the reference that every other engine must equal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.ask import Ask, ClientId, Replies
from fedllm.core.client import SERVER, Fleet
from fedllm.core.errors import ClientError, FedLLMError, Withheld, plain
from fedllm.core.form import by_part, crossing
from fedllm.core.payload import Payload
from fedllm.core.program import Fold, serve
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.engines.call import Session
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall, server_info
from fedllm.engines.clock import BOOK, Clock
from fedllm.engines.job import Job
from fedllm.engines.world import World, method_on
from fedllm.local.flops import steps_of
from fedllm.wire import codec

LOST = "lost while it worked"


class InProcess:
    """Runs each client function to its end before the next one starts."""

    def __init__(self, stack: Sequence[Any], world: World, record: Record | None = None, *,
                 quorum: float | int = 1, loopback: bool = False) -> None:
        """`stack` is the method and its layers; `loopback` turns every message into bytes and back."""
        self.stack, self.world, self.record = tuple(stack), world, record or Record()
        self.quorum, self.loopback = quorum, loopback
        self.infos = {c.id: c for c in world.infos()} | {SERVER: server_info()}
        self.memory: dict[ClientId, dict[str, Any]] = {}
        self.clock = self._clock()
        self.timed = world.fleet is not None
        self.begin(0)

    def _clock(self) -> Clock:
        """What tells the time, and so who answers first."""
        return Clock(self, self.world.fleet or Fleet())

    def begin(self, round: int) -> None:
        """A new round (or the same one again): memory as it was committed."""
        self.round = round
        self._staged: dict[ClientId, dict[str, Any]] = {}
        self._before: dict[ClientId, dict[str, Any]] = {}
        self._visits: Counter[tuple[str, ClientId]] = Counter()
        self._sessions: dict[ClientId, Session] = {}
        self.clock.restore(self.memory.get(SERVER, {}).get(BOOK))

    def commit(self) -> dict[ClientId, dict[str, Any]]:
        """Make this round's memory permanent; returns the memories that were touched."""
        if self.clock.used:
            self.staged(SERVER)[BOOK] = self.clock.book()
        touched, self._staged, self._sessions = self._staged, {}, {}
        self.memory.update(touched)
        return touched

    def abandon(self) -> dict[ClientId, dict[str, Any]]:
        """This round does not count: memory as it was, and only the time that it took has passed."""
        now, wasted = self.clock.now, self.clock.wasted
        self.begin(self.round)
        self.clock.now, self.clock.wasted = now, wasted
        return InProcess.commit(self)

    def finish(self, round: int) -> None:
        """After the last round: nobody works on for a run that is over."""
        self.begin(round)
        if self.clock.used or self.clock.flying:
            self.clock.end()
            self.commit()

    def undo(self, client: ClientId) -> None:
        """What its last job noted in its memory does not count."""
        self._staged[client] = dict(self._before.get(client, {}))

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        if self.timed or any(ask.enough is not None or ask.flight is not None for ask in asks):
            return self.clock.send(asks)
        folds = [Fold(ask, self.quorum, rows={c: i.n for c, i in self.infos.items()}) for ask in asks]
        for job, reply in self.answers(self.jobs(folds)):
            if not isinstance(reply, str):
                reply = LOST if self.loses(job) else self.cross("up", job, reply)
            self.land(job.fold, job.client, reply)
        return [self.close(fold) for fold in folds]

    def chance(self, job: Job) -> tuple[float, np.random.Generator]:
        """Of a job's end, drawn alike whether time is virtual or not: its place among those of one moment, and more."""
        draw = numpy_stream(self.world.seed, self.round, job.client, job.fold.ask.phase, job.visit, "lands")
        return float(draw.random()), draw

    def loses(self, job: Job, draw: np.random.Generator | None = None) -> bool:
        """Whether this client is lost while it works (`draw`: the rest of its `chance`, where that was drawn already);
        what it noted in its memory does not count then."""
        dropout = self.infos[job.client].profile.dropout
        lost = bool(dropout) and float((draw or self.chance(job)[1]).random()) < dropout
        if lost:
            self.undo(job.client)
        return lost

    def land(self, fold: Fold, client: ClientId, reply: Payload | str, seconds: float | None = None) -> None:
        """Fold a reply that has come, or book why there is none."""
        told = {} if seconds is None else {"seconds": seconds}
        if isinstance(reply, str):
            reply = plain(reply)
            self.record.emit("missing", round=self.round, phase=fold.ask.phase, client=client, why=reply, **told)
            return fold.miss(client, reply)
        if not fold.take(client, reply, seconds):
            self.record.emit("refused", round=self.round, phase=fold.ask.phase, client=client,
                             why=fold.missing[client], **told)
        elif told:
            self.record.emit("answered", round=self.round, phase=fold.ask.phase, client=client, **told)

    def close(self, fold: Fold) -> Replies:
        """What came of an ask; whose reply the others' outvote is written down."""
        for client, why in fold.outvoted().items():
            self.record.emit("refused", round=self.round, phase=fold.ask.phase, client=client, why=plain(why))
        return fold.done()

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | str]]:
        """Each job's reply, or why there is none; in the order of the jobs."""
        for job in jobs:
            yield job, self.work(job, lambda request: carry_out([request], self.world.limits)[0])

    def work(self, job: Job, submit: Any) -> Payload | str:
        """Run one client function; `submit` carries its requests to the model."""
        ask = job.fold.ask
        if why := self._absent(job):
            return why
        msg = self.cross("down", job, ask.msgs[job.client])
        self._before[job.client] = dict(self.staged(job.client))

        def counted(request: Any) -> Any:
            job.took.steps += steps_of(request, self.world.local.lot)
            return submit(request)

        call = ClientCall(self.infos[job.client], self.world, self.staged(job.client), self.round, ask.phase,
                          job.visit, counted, self.world.model_of(job.client, method_on(self.stack)),
                          self._sessions.setdefault(job.client, Session()))
        try:
            reply = serve(self.stack, ask.phase, msg, call, call.keep)
        except Withheld as why:
            return str(why)
        except FedLLMError:
            raise
        except Exception as error:
            raise ClientError(f"client '{job.client}' failed in {ask.phase} of round {self.round}: "
                              f"{type(error).__name__}: {error}") from error
        return self._late(job, "before it answered") or reply

    def staged(self, client: ClientId) -> MutableMapping[str, Any]:
        """The client's memory in this round; changes count when the round is committed."""
        if client not in self._staged:
            self._staged[client] = dict(self.memory.get(client, {}))
        return self._staged[client]

    def jobs(self, folds: Sequence[Fold], clients: Sequence[ClientId] | None = None) -> Iterator[Job]:
        """One job for each client that an ask names (or for these `clients` of them)."""
        now = time.monotonic()
        for fold in folds:
            ask = fold.ask
            ends = None if ask.deadline is None or self.timed else now + ask.deadline
            for client in ask.msgs if clients is None else clients:
                if client not in self.infos:
                    raise ClientError(f"{ask.phase} asks '{client}', which is not a client of this run")
                self._visits[ask.phase, client] += 1
                yield Job(fold, client, self._visits[ask.phase, client], ends)

    def _absent(self, job: Job) -> str | None:
        """Why this client does not begin at all, or None."""
        if late := self._late(job, "before its turn came"):
            return late
        if self.timed and self.clock.asleep(job.client):
            return "its day has not begun"
        up = self.infos[job.client].profile.availability
        if up < 1 and numpy_stream(self.world.seed, self.round, job.client, "availability").random() >= up:
            return f"not available in round {self.round}"
        return None

    def _late(self, job: Job, when: str) -> str | None:
        if job.ends is None or time.monotonic() <= job.ends:
            return None
        return f"its deadline of {job.fold.ask.deadline} s passed {when}"

    def cross(self, way: str, job: Job, payload: Payload) -> Payload:
        """Count a payload's bytes on the wire; an empty one is no message, and the server's own cross no wire."""
        if job.client == SERVER or not payload:
            return payload
        name = type(job.fold.ask.owner).__name__
        data = codec.encode(payload) if self.loopback else None
        size = codec.size(payload) if data is None else len(data)
        job.took.count(way, size)
        ask = job.fold.ask
        holds = crossing(payload, ask.expects, ask.hidden) if way == "up" else {}
        parts = by_part(payload, ask.expects if way == "up" else None)
        self.record.crossed(way, ask.phase, job.client, size, self.round, name, parts=parts, **holds)
        return payload if data is None else codec.decode(data)

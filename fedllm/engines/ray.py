"""A simulation spread over a Ray cluster: each worker has one resident model and runs its share vectorized.

Who is in which share follows from the ask and the number of workers alone, and answers are folded in the order of the
ask: neither a quick worker nor a killed one changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, ClientId
from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import FedLLMError, RunError
from fedllm.core.payload import Payload
from fedllm.core.program import Fold
from fedllm.core.record import Record
from fedllm.engines.carry import carry_out
from fedllm.engines.in_process import InProcess
from fedllm.engines.job import Job
from fedllm.engines.parcel import Parcel, unwrap, wrap
from fedllm.engines.ray_pool import Lost, Pool
from fedllm.engines.vectorized import WAVE, Vectorized
from fedllm.engines.world import World


@dataclass(frozen=True)
class Share:
    """What one worker does at a time: all jobs of some clients in one trip."""

    round: int
    infos: Mapping[ClientId, ClientInfo]
    tasks: Sequence[tuple[str, ClientId, int]]
    """(phase, client, visit) of each job."""
    contents: Parcel
    """Messages of the tasks, and the clients' memories."""


@dataclass(frozen=True)
class Done:
    """What came of a share: replies of its tasks and memories of its clients, or the error that ends the run."""

    contents: Parcel | None = None
    steps: Sequence[float] = ()
    """Local steps of each task, as virtual time counts them."""
    loads: int = 0
    """How many models its worker has loaded so far."""
    error: FedLLMError | None = None


@dataclass(frozen=True)
class Opening:
    """How a worker gets what its clients stand on."""

    key: str
    """Another run has another."""
    world: Callable[[], World]


class Worker:
    """One process of the cluster, as an actor: loads a run's model once and keeps it."""

    def __init__(self) -> None:
        self.key = ""
        self.world: World | None = None
        self.loads = 0

    def pid(self) -> int:
        """Its process, on its machine."""
        import os

        return os.getpid()

    def work(self, told: tuple[Sequence[Any], Opening], share: Share) -> Done:
        """A share, done as the vectorized engine does it."""
        stack, opening = told
        try:
            if self.world is None or self.key != opening.key:
                self.world, self.key, self.loads = opening.world(), opening.key, self.loads + 1
            msgs, memories = unwrap(share.contents)
            engine = Vectorized(stack, self.world)
            engine.timed = False  # whose turn it is, and when, is told by the engine that asks
            engine.begin(share.round)
            engine.infos.update(share.infos)
            engine.memory.update(memories)
            jobs = [Job(_alone(engine.stack, phase, client, msg), client, visit, None)
                    for (phase, client, visit), msg in zip(share.tasks, msgs, strict=True)]
            replies = [reply for _, reply in engine.answers(iter(jobs))]
            return Done(wrap((replies, engine.commit())), [job.took.steps for job in jobs], self.loads)
        except FedLLMError as error:
            return Done(error=type(error)(str(error)))


def _alone(stack: Sequence[Any], phase: str, client: ClientId, msg: Payload) -> Fold:
    owner, _, name = phase.partition(".")
    part = next(p for p in stack if type(p).__name__ == owner)
    return Fold(Ask(getattr(part, name), {client: msg}))


class Ray(InProcess):
    """Equal to `InProcess` up to rounding; memories stay here, and travel with each share and back."""

    def __init__(self, stack: Sequence[Any], world: World, record: Record | None = None, *, pool: Pool,
                 opening: Opening, quorum: float | int = 1, loopback: bool = False) -> None:
        """`pool` has the workers; several engines of a run share it, and its `opening`."""
        super().__init__(stack, world, record, quorum=quorum, loopback=loopback)
        self.pool = pool
        self._told = pool.keep((self.stack, opening))

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | str]]:
        """All shares at once, as far as workers are free; the server's own jobs are done here, in their place."""
        todo, ready = list(jobs), dict[int, Payload | str]()
        for i, job in enumerate(todo):
            if job.client != SERVER and (why := self._absent(job)):
                ready[i] = why
        lots = self._lots([i for i, job in enumerate(todo) if job.client != SERVER and i not in ready], todo)
        shares = [self._share([todo[i] for i in lot]) for lot in lots]
        limits = [max((todo[i].ends or math.inf) for i in lot) for lot in lots]
        came = self.pool.work(self._told, shares, limits)
        for i, job in enumerate(todo):
            if job.client == SERVER:
                yield job, self.work(job, lambda request: carry_out([request], self.world.limits)[0])
                continue
            while i not in ready:
                at, got = next(came)
                ready.update(zip(lots[at], self._taken([todo[k] for k in lots[at]], got), strict=True))
            yield job, ready.pop(i)
        for _ in came:  # nothing is left; lets the pool write down what it lost
            pass

    def _lots(self, far: Sequence[int], todo: Sequence[Job]) -> list[list[int]]:
        """Numbers of the jobs, share by share; all jobs of a client are in one share, in order."""
        mine: dict[ClientId, list[int]] = {}
        for i in far:
            mine.setdefault(todo[i].client, []).append(i)
        clients = list(mine)
        most = min(WAVE, max(1, math.ceil(len(clients) / self.pool.workers)))
        return [sorted(i for c in clients[at : at + most] for i in mine[c]) for at in range(0, len(clients), most)]

    def _share(self, jobs: Sequence[Job]) -> Share:
        clients = {job.client for job in jobs}
        msgs = [dict(self.cross("down", job, job.fold.ask.msgs[job.client])) for job in jobs]
        memories = {c: dict(self.staged(c)) for c in sorted(clients)}
        return Share(self.round, {c: self.infos[c] for c in sorted(clients)},
                     [(job.fold.ask.phase, job.client, job.visit) for job in jobs], wrap((msgs, memories)))

    def _taken(self, jobs: Sequence[Job], got: Done | Lost) -> list[Payload | str]:
        """The replies of a share that came back, or why there is none."""
        for why in self.pool.heard():
            self.record.emit("worker_lost", round=self.round, why=why)
        if isinstance(got, Lost):
            return [self._late(job, got.when) or got.when for job in jobs]
        if got.error is not None:
            raise got.error
        if got.contents is None:
            raise RunError("a worker's answer is empty")
        replies, memories = unwrap(got.contents)
        for job, steps in zip(jobs, got.steps, strict=True):
            job.took.steps += steps
            self._before[job.client] = dict(self.staged(job.client))
        self._staged.update(memories)
        return [self._late(job, "before it answered") or reply for job, reply in zip(jobs, replies, strict=True)]

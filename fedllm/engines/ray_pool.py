"""The workers of a Ray cluster: kept busy, watched, and replaced when they die."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import RecipeError, RunError

log = logging.getLogger(__name__)
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Environment of a cluster started here: it reports to nobody, and its workers are not kept waiting by other work."""
START = 300.0
"""Seconds in which the cluster must find a place for a worker and start its process."""
PATIENCE = 3600.0
"""Seconds after which a worker that is still at one share counts as lost, where the ask names no deadline."""
LOSSES = 3
"""Times that one share is done again."""


@dataclass(frozen=True)
class Lost:
    """A share without an answer; `when` is how the engine says it: its deadline passed ..."""

    when: str


@dataclass
class _Turn:
    """One share on its way through the workers."""

    at: int
    share: Any
    limit: float
    losses: int = 0
    ends: float = 0.0


class Pool:
    """`workers` actors, each with `threads` cores and its share of the cluster's cards.

    Made at the first work, and gone after `close`.
    """

    def __init__(self, kind: type, workers: int, threads: int = 1, address: str | None = None) -> None:
        """`kind` is the workers' class: it has `pid()` and `work(told, share)`. `address` is a running cluster's (None:
        one is started here)."""
        self.kind, self.workers, self.threads, self.address = kind, workers, threads, address
        self._actors: list[Any] = []
        self.pids: list[int] = []
        self._losses: deque[str] = deque()
        self._started = False
        self._ray = _ray()

    def keep(self, value: Any) -> Any:
        """Put what many shares need into the cluster once."""
        self._begin()
        return self._ray.put(value)

    def heard(self) -> Iterator[str]:
        """What was lost since the last time."""
        while self._losses:
            yield self._losses.popleft()

    def work(self, told: Any, shares: Sequence[Any], limits: Sequence[float]) -> Iterator[tuple[int, Any]]:
        """(number, outcome) of each share as it comes; a share whose worker dies is done again by another.

        `limits` are monotonic times after which an answer is of no use. RunError when a share is lost again and again.
        """
        self._hire(range(len(self._actors), min(self.workers, len(shares))))
        todo = deque(_Turn(i, self._ray.put(s), limit) for i, (s, limit) in enumerate(zip(shares, limits, strict=True)))
        free, busy = list(range(len(self._actors))), dict[Any, tuple[int, _Turn]]()
        while todo or busy:
            while todo and free:
                turn, i = todo.popleft(), free.pop(0)
                now = time.monotonic()
                if now > turn.limit:
                    free.append(i)
                    yield turn.at, Lost("before its turn came")
                    continue
                turn.ends = min(turn.limit, now + PATIENCE)
                busy[self._actors[i].work.remote(told, turn.share)] = (i, turn)
            if not busy:
                continue
            first = min(turn.ends for _, turn in busy.values())
            done, _ = self._ray.wait(list(busy), num_returns=1, timeout=max(0.0, first - time.monotonic()))
            for ref in done:
                i, turn = busy.pop(ref)
                try:
                    got = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:  # no worker is to blame, and again it would fail
                    raise RunError(f"a worker failed: {str(error.cause or error)[-500:]}") from None
                except self._ray.exceptions.RayError as error:
                    self._again(i, turn, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                    todo.appendleft(turn)
                else:
                    yield turn.at, got
                free.append(i)
            now = time.monotonic()
            for ref in [ref for ref, (_, turn) in busy.items() if turn.ends <= now]:
                i, turn = busy.pop(ref)
                if turn.limit <= now:
                    self._replace(i)
                    yield turn.at, Lost("before it answered")
                else:
                    self._again(i, turn, f"it was silent for {PATIENCE:g} s")
                    todo.appendleft(turn)
                free.append(i)

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self.pids = [], []
        if self._started:
            self._ray.shutdown()
            self._started = False

    def _begin(self) -> None:
        if self._ray.is_initialized():
            return
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        local = {} if self.address else {"num_cpus": self.workers * self.threads, "include_dashboard": False}
        try:
            self._ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"engine.address = {self.address!r}: no Ray cluster answers there ({error})") from None
        self._started = True

    def _hire(self, places: Sequence[int]) -> None:
        """Workers for these places (new ones, or of lost workers); comes back when their processes live."""
        cards = int(self._ray.cluster_resources().get("GPU", 0))
        share = 1 / -(-self.workers // cards) if cards else 0  # of a card; Ray shows a worker no other
        make = self._ray.remote(self.kind).options(num_cpus=self.threads, num_gpus=share, max_restarts=0)
        fresh = [make.remote() for _ in places]
        try:
            pids = self._ray.get([actor.pid.remote() for actor in fresh], timeout=START)
        except self._ray.exceptions.RayError as error:
            for actor in fresh:
                self._ray.kill(actor)
            have = self._ray.cluster_resources().get("CPU", 0)
            raise RunError(f"{len(fresh)} workers of {self.threads} cores did not start in {START:g} s; the cluster "
                           f"has {have:g} cores for {self.workers} workers ({type(error).__name__})") from None
        for i, actor, pid in zip(places, fresh, pids, strict=True):
            self._actors[i : i + 1], self.pids[i : i + 1] = [actor], [pid]

    def _replace(self, i: int) -> None:
        with contextlib.suppress(Exception):  # it may be dead already
            self._ray.kill(self._actors[i])
        self._hire([i])

    def _again(self, i: int, turn: _Turn, why: str) -> None:
        """Book a loss, and have another process in the place of the lost one."""
        turn.losses += 1
        why = f"worker {self.pids[i]} was lost ({why}); its share is done again"
        log.warning(why)
        self._losses.append(why)
        if turn.losses > LOSSES:
            raise RunError(f"a share of the clients was lost {turn.losses} times; the last: {why}. Fewer clients at "
                           "once need less memory: raise engine.workers, or lower engine.batch_tokens")
        self._replace(i)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise RecipeError("engine.kind = 'ray' needs Ray; pip install 'fedlm[ray]'") from None
    return ray

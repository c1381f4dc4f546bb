"""Many clients in one forward and backward: the default engine of a simulation.

Each client function runs as a greenlet. When it asks for heavy work it waits; once every live client waits, requests
that can share a step run together, and all go on. Client code stays plain and does not know.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

from greenlet import greenlet

from fedllm.core.errors import ClientError, FedLLMError
from fedllm.core.payload import Payload
from fedllm.engines.carry import carry_out
from fedllm.engines.in_process import InProcess
from fedllm.engines.job import Job
from fedllm.local.requests import Request

WAVE = 32
"""How many clients are alive at once; replies are folded wave by wave, so memory does not grow with the cohort."""


class Vectorized(InProcess):
    """Equal to `InProcess` up to rounding, and several times as fast."""

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Payload | str]]:
        while wave := list(itertools.islice(jobs, WAVE)):
            yield from zip(wave, self._together(wave), strict=True)

    def _together(self, wave: list[Job]) -> list[Payload | str]:
        hub = greenlet.getcurrent()
        replies: dict[int, Payload | str] = {}
        waiting: dict[int, tuple[greenlet, Request]] = {}

        def live(i: int) -> Payload | str:
            return self.work(wave[i], hub.switch)  # submitting a request is a switch to the hub

        def advance(i: int, runner: greenlet, *answer: Any) -> None:
            got = runner.switch(*answer)
            if runner.dead:
                replies[i] = got
            else:
                waiting[i] = (runner, got)

        for i in range(len(wave)):
            advance(i, greenlet(live, parent=hub), i)
        while waiting:
            now, waiting = waiting, {}
            answers = self._run({i: request for i, (_, request) in now.items()})
            for i, (runner, _) in now.items():
                advance(i, runner, answers[i])
        return [replies[i] for i in range(len(wave))]

    def _run(self, requests: dict[int, Request]) -> dict[int, Any]:
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, request in requests.items():
            groups[request.group].append(i)
        answers: dict[int, Any] = {}
        for members in groups.values():
            lot = [requests[i] for i in members]
            answers.update(zip(members, self._guarded(lot), strict=True))
        return answers

    def _guarded(self, lot: list[Request]) -> list[Any]:
        """Run a group; when it fails, find whose request it was."""
        try:
            return carry_out(lot, self.world.limits)
        except FedLLMError:
            raise
        except Exception as error:
            for request in lot if len(lot) > 1 else []:
                try:
                    carry_out([request], self.world.limits)
                except Exception as own:
                    raise ClientError(f"client '{request.client}' failed in a {type(request).__name__} of round "
                                      f"{self.round}: {type(own).__name__}: {own}") from own
            raise ClientError(f"clients {[r.client for r in lot]} failed together in round {self.round}: "
                              f"{type(error).__name__}: {error}") from error

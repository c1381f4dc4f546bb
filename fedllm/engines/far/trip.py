"""One question on its way to a far site, and messages as bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm.core.ask import ClientId
from fedllm.core.payload import Payload
from fedllm.engines.far.line import Head
from fedllm.engines.job import Job
from fedllm.wire import codec

Answer = tuple[Payload | str, int]
"""The reply or why there is none, and how often the message was sent."""


@dataclass(eq=False)
class Trip:
    """One question on its way, and what comes of it."""

    job: Job
    head: Head
    begun: float
    """In monotonic time, as `lands`."""
    lands: float = 0.0
    answer: Future[Answer] = field(default_factory=Future)
    over: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the answer any longer."""
    booked: bool = False
    """Whether its bytes are counted."""

    @property
    def client(self) -> ClientId:
        return self.job.client

    @property
    def phase(self) -> str:
        return self.job.fold.ask.phase

    @property
    def visit(self) -> str:
        """As the site names it."""
        return f"{self.phase}#{self.job.visit}"

    @property
    def reply(self) -> Payload | str:
        """The answer, or why there is none; waits for it."""
        return self.answer.result()[0]

    def arrive(self, answer: Answer) -> None:
        """This is what came of it."""
        self.lands = time.monotonic()
        self.answer.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """An error that ends the run."""
        self.lands = time.monotonic()
        self.answer.set_exception(error)


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

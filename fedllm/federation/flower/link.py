"""The line to far sites over Flower: a `engines.far.sites.Link` made of messages on a Grid."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import PayloadError
from fedllm.engines.far.desk import fetched
from fedllm.engines.far.line import Barred, Head, Silence
from fedllm.federation.flower.wire import KIND, from_record, to_record

log = logging.getLogger(__name__)
FRESH = 5.0
"""Seconds for which a sign of life holds; a site at work gives one every 2 s (`desk.HOLD`)."""
POLL = 0.02
"""Seconds from one look for answers to the next."""
SLICE = 256
"""Answers asked for at once."""
LAST = 5.0
"""Seconds that the last look for answers may take when the line is closed."""
LATE = 30.0
"""Seconds that a message may outlive the wait for its answer."""


@dataclass
class Life:
    """What a site's last sign of life said, and when."""

    boot: str
    at: float


class FlowerLink:
    """A SuperNode has one message at a time, so long work is fetched: the site says `pending` until it is done."""

    def __init__(self, grid: Any, nodes: Mapping[str, int],
                 barred: Callable[[str], str | None] = lambda site: None) -> None:
        """`nodes` are the sites' node ids; nobody else is talked to, and none for whom `barred` has a reason."""
        self.grid, self.nodes, self.barred = grid, dict(nodes), barred
        self.lives: dict[str, Life] = {}
        self._lock, self._post = threading.Lock(), threading.Lock()
        self._waiting: dict[str, Future[Any]] = {}
        self._some, self._closed = threading.Event(), False
        self._listener = threading.Thread(target=self._listen, name="flower-answers", daemon=True)
        self._listener.start()

    def call(self, site: str, head: Head, body: bytes | bytearray, seconds: float,
             over: threading.Event | None = None) -> tuple[Head, Any]:
        """The site's answer; raises `Silence` when there is none within `seconds`, or once `over` is set."""
        life, probe = self.lives.get(site), head.get("op") == "probe" and not self.barred(site)
        if probe and life is not None and time.monotonic() - life.at < FRESH:
            return {"boot": life.boot}, b""
        return fetched(lambda told, data, ends: self._trip(site, told, data, ends, over), head, body, seconds)

    def revive(self, site: str) -> None:
        """Nothing to do: `fedllm join` starts a lost process again by itself."""

    def close(self) -> None:
        """No answer is waited for any longer, nor asked for."""
        self._closed = True
        self._some.set()
        self._listener.join(LAST)

    def _trip(self, site: str, head: Head, body: bytes | bytearray, ends: float, over: threading.Event | None
              ) -> tuple[dict[str, Any], Any]:
        """One message there and its answer back."""
        from flwr.app import Message

        left = ends - time.monotonic()
        if left <= 0:
            raise Silence("its deadline passed")
        if why := self.barred(site):
            raise Barred(why)
        message = Message(to_record(head, body), dst_node_id=self.nodes[site], message_type=KIND, ttl=left + LATE)
        answer: Future[Any] = Future()
        try:
            with self._post:
                [number] = self.grid.push_messages([message])
        except Exception as error:  # the SuperLink is gone, or refuses
            raise Silence(f"the message could not be sent: {type(error).__name__}: {str(error)[:200]}") from None
        if not number:
            raise Silence("the SuperLink did not take the message")
        with self._lock:
            self._waiting[number] = answer
        self._some.set()
        try:
            return self._read(site, self._await(answer, ends, over))
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _await(self, answer: Future[Any], ends: float, over: threading.Event | None) -> Any:
        while True:
            left = ends - time.monotonic()
            try:
                return answer.result(max(0.0, min(left, 0.5)))
            except NotYet:
                if left <= 0 or self._closed or (over is not None and over.is_set()):
                    raise Silence("no answer came in time") from None

    def _read(self, site: str, reply: Any) -> tuple[dict[str, Any], Any]:
        if reply.has_error():
            raise Silence(f"Flower says: {str(reply.error.reason)[:200]} (code {reply.error.code})")
        try:
            said, data = from_record(reply.content)
        except PayloadError as error:
            raise Silence(str(error)) from None
        if "boot" in said:
            self.lives[site] = Life(str(said["boot"]), time.monotonic())
        return said, data

    def _listen(self) -> None:
        """Look for all awaited answers at once."""
        while not self._closed:
            with self._lock:
                numbers = list(self._waiting)
            if not numbers:
                self._some.wait(1.0)
                self._some.clear()
                continue
            got = 0
            try:
                for at in range(0, len(numbers), SLICE):
                    for reply in self.grid.pull_messages(numbers[at : at + SLICE]):
                        got += 1
                        with self._lock:
                            waiting = self._waiting.get(reply.metadata.reply_to_message_id)
                        if waiting is not None and not waiting.done():
                            waiting.set_result(reply)
            except Exception as error:  # a SuperLink that is gone: those who wait give up at their own deadlines
                if self._closed:
                    return
                log.warning("no answers can be had: %s: %s", type(error).__name__, str(error)[:200])
                time.sleep(1.0)
            if not got:
                time.sleep(POLL)

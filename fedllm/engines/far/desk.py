"""A site's host behind a line that must not be held: long work is answered `pending`, and fetched when it is done."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any

from fedllm.engines.far.line import Body, Head, Silence
from fedllm.engines.far.pieces import PIECE_OPS
from fedllm.engines.far.site import BOOT, Said, SiteHost, SiteRun
from fedllm.engines.far.sites import PROTOCOL

HOLD = 2.0
"""Seconds for which a message is held until its work is done; then the answer is `pending`, which is a sign of life."""
KEPT = 4
"""Pieces of work whose answers wait to be fetched; the oldest is one that nobody waits for."""

OpenRun = Callable[[Head], tuple[SiteRun, dict[str, Any]]]


def fetched(trip: Callable[[Head, Body, float], tuple[Head, Any]], head: Head, body: Body, seconds: float
            ) -> tuple[Head, Any]:
    """A desk's answer within so many seconds: the question goes there once by `trip` (envelope, body, when it ends),
    and its answer is asked for until it is done. `Silence` where the desk knows nothing of it any more."""
    ends, ticket = time.monotonic() + seconds, uuid.uuid4().hex
    said, data = trip({**head, "ticket": ticket}, body, ends)
    while "pending" in said:
        said, data = trip({"op": "fetch", "protocol": PROTOCOL, "ticket": ticket}, b"", ends)
    if "unknown" in said:
        raise Silence("its process was started again in the middle of its work, or an answer was lost")
    return said, data


class Desk:
    """A site's host, for a line that must not be held: work goes on while `pending` is said."""

    def __init__(self, open_run: OpenRun, hold: float = HOLD, tell: Callable[..., None] = lambda what, **_: None,
                 piece: int | None = None) -> None:
        self.open_run, self.hold, self.tell, self.piece = open_run, hold, tell, piece
        self.host, self.run = SiteHost(open_run, tell, piece), ""
        self.work: dict[str, Future[Said]] = {}

    def answer(self, head: Head, body: Any) -> Said:
        """The host's answer if it comes soon, or `pending`; `fetch` asks for it again."""
        op, ticket = head.get("op"), str(head.get("ticket"))
        if op == "probe" or op in PIECE_OPS:  # soon answered
            return self.host.answer(head, body)
        if op != "fetch":
            self._begin(ticket, head, body)
        if (work := self.work.get(ticket)) is None:
            return {"unknown": True, "boot": BOOT}, b""
        try:
            answer = work.result(self.hold)
        except NotYet:
            return {"pending": True, "boot": BOOT}, b""
        self.work.pop(ticket, None)  # whoever asked twice at once has it too
        return answer

    def _begin(self, ticket: str, head: Head, body: Any) -> None:
        done: Future[Said] = Future()
        self.work[ticket] = done
        if head.get("op") == "open" and self.run not in ("", str(head.get("run"))):
            # a run of its own, which finds nothing of the one before
            self.host = SiteHost(self.open_run, self.tell, self.piece)
        if head.get("op") == "open":
            self.run = str(head.get("run"))
        host = self.host
        for old in list(self.work)[:-KEPT]:
            self.work.pop(old, None)

        def run() -> None:
            try:
                done.set_result(host.answer(head, body))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="desk-work", daemon=True).start()

"""One organisation's half of a run: a resident base model, its own rows, and the same client functions as anywhere."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fedllm.core.client import ClientInfo
from fedllm.core.errors import FedLLMError, PayloadError, Withheld
from fedllm.core.payload import Payload, non_finite
from fedllm.core.program import serve
from fedllm.engines.client import ClientCall, Session, carry_out
from fedllm.engines.far.pieces import PIECE_OPS, Pieces
from fedllm.engines.far.sites import PROTOCOL, Body, Head
from fedllm.engines.world import World, method_on
from fedllm.local.requests import Request
from fedllm.wire import codec

log = logging.getLogger(__name__)
BOOT = uuid.uuid4().hex
"""Names this process: the server sees by it that a site was started again."""

GIVEN_UP = "the server does not wait for it any longer"
"""Why a site stops in the middle of its work."""

REMEMBERED = 256
"""Visits that were given up, of which a site's process knows."""

ECHO = 4 << 30
"""Bytes of the longest echo (a measurement of the line)."""

Said = tuple[dict[str, Any], Body]


class Memory(Protocol):
    """A client's durable memory: staged by attempt, permanent when the server says that the attempt counted."""

    def settle(self, attempt: str, round: int) -> None: ...
    def stage(self, attempt: str, round: int) -> MutableMapping[str, Any]: ...
    def answered(self, attempt: str, visit: str) -> Body | None: ...
    def keep(self, attempt: str, visit: str, reply: Body) -> None: ...
    def drop(self, attempt: str, visit: str) -> None: ...


class Lacks(FedLLMError):
    """The site cannot open the run without something that the message did not bring; the text names it."""


class GivenUp(Withheld):
    """This work is of no use any longer."""


class SiteRun:
    """A run as one site takes part in it."""

    def __init__(self, stack: Sequence[Any], world: World, info: ClientInfo, memory: Memory,
                 may: Callable[[str, Payload], str | None] = lambda way, payload: None) -> None:
        """`may("down" or "up", payload)` is the site's own word: a reason to refuse, or None."""
        self.stack, self.world, self.info, self.memory, self.may = tuple(stack), world, info, memory, may
        self.over = False  # set when another coordinator's process takes the run up
        self._dropped: tuple[tuple[str, str], ...] = ()
        self._session = "", Session()  # of the present attempt at a round

    def drop(self, visits: Sequence[Sequence[Any]]) -> None:
        """Nobody waits for these [attempt, visit] any longer: work on them stops, or does not begin."""
        told = tuple((str(attempt), str(visit)) for attempt, visit in visits)
        self._dropped = (*self._dropped, *told)[-REMEMBERED:]

    def hear(self, head: Head) -> None:
        """What counted and what did not, of work that is done."""
        self.drop(head.get("dropped", ()))
        for attempt, visit in head.get("dropped", ()):
            self.memory.drop(str(attempt), str(visit))
        for attempt, round in head.get("settled", ()):
            if str(attempt) == self._session[0]:
                self._session = "", Session()
            self.memory.settle(str(attempt), int(round))

    def ask(self, head: Head, body: Body) -> Said:
        """Run one client function; asked for the same again (attempt and visit) it gives the same answer."""
        self.hear(head)
        attempt, visit = str(head["attempt"]), f"{head['phase']}#{int(head['visit'])}"
        if (attempt, visit) in self._dropped:
            return {"refused": GIVEN_UP}, b""
        if (before := self.memory.answered(attempt, visit)) is not None:
            return {"boot": BOOT}, before
        msg = codec.decode(body) if len(body) else {}
        if bad := non_finite(msg):
            return {"refused": f"'{bad}' of the message holds NaN or infinity"}, b""
        if why := self.may("down", msg):
            return {"refused": why}, b""
        wanted = set(head["stack"])
        stack = [part for part in self.stack if type(part).__name__ in wanted]
        memory = self.memory.stage(attempt, int(head["round"]))
        if self._session[0] != attempt:
            self._session = attempt, Session()

        def go_on() -> None:
            if self.over or (attempt, visit) in self._dropped:
                raise GivenUp(GIVEN_UP)

        def submit(request: Request) -> Any:
            go_on()
            return carry_out([request], limits)[0]

        limits = replace(self.world.limits, go_on=go_on)
        call = ClientCall(self.info, self.world, memory, int(head["round"]), str(head["phase"]), int(head["visit"]),
                          submit, self.world.model_of(self.info.id, method_on(self.stack)), self._session[1])
        try:
            reply = serve(stack, str(head["phase"]), msg, call, call.keep)
            go_on()
        except GivenUp:
            self.memory.drop(attempt, visit)
            return {"refused": GIVEN_UP}, b""
        if why := self.may("up", reply):
            return {"refused": why}, b""
        data = codec.encode(reply) if reply else b""
        self.memory.keep(attempt, visit, data)
        return {"boot": BOOT}, data


class SiteHost:
    """Answers everything that the server may say to a site's process; no message ever raises."""

    def __init__(self, open_run: Callable[[Head], tuple[SiteRun, dict[str, Any]]]) -> None:
        """`open_run` makes the run that a message describes (what came with it is under `body`), or raises FedLLMError
        with the reason to refuse it."""
        self.open_run = open_run
        self.run: SiteRun | None = None
        self.loads = 0
        self.pieces = Pieces()
        self._lock = threading.Lock()
        self._opened: str | None = None
        self._said: dict[str, Any] = {}

    def answer(self, head: Head, body: Body) -> Said:
        """The reply's envelope and body; what goes wrong is said in the envelope, under `refused` or `failed`."""
        try:
            if head.get("protocol") != PROTOCOL:
                return {"refused": f"it speaks protocol {PROTOCOL}, the server {head.get('protocol')!r}"}, b""
            if head.get("op") == "probe":
                return {"boot": BOOT, "open": self.run is not None, "loads": self.loads}, b""
            if head.get("op") in PIECE_OPS:
                return self.pieces.serve(head, body)
            if self.run is not None and head.get("op") == "drop":
                self.run.drop(head["visits"])
            if head.get("op") == "drop":
                return {"boot": BOOT}, b""
            if self.run is not None and head.get("op") == "open" and head["incarnation"] != self._opened:
                self.run.over = True  # who asked for its present work is gone
            body = self.pieces.taken(head, body)
            if head.get("op") == "echo":
                said: Said = {"boot": BOOT, "got": len(body)}, body[:min(int(head["size"]), ECHO)]
            else:
                with self._lock:
                    said = self._serve(head, body)
            return self.pieces.given(head, *said)
        except (FedLLMError, KeyError, TypeError, ValueError) as error:
            kind = "refused" if isinstance(error, PayloadError) or head.get("op") != "ask" else "failed"
            log.warning("%s: %s", kind, error)
            return {kind: f"{type(error).__name__}: {error}", "boot": BOOT}, b""
        except Exception as error:
            log.exception("a client function failed")
            return {"failed": f"{head.get('phase')} of round {head.get('round')}: {type(error).__name__}: {error}",
                    "boot": BOOT}, b""

    def _serve(self, head: Head, body: Body) -> Said:
        if head["op"] == "open":
            return self._open({**head, "body": body}), b""
        if self.run is None:
            return {"closed": True, "boot": BOOT}, b""
        if head["op"] == "ask":
            return self.run.ask(head, body)
        if head["op"] == "close":
            self.run.hear(head)
            return {"boot": BOOT, "loads": self.loads}, b""
        raise PayloadError(f"'{head['op']}' is nothing that a site does")

    def _open(self, head: Head) -> dict[str, Any]:
        """Load the model once; told the same again it says the same again."""
        if self.run is None or self._opened != head["incarnation"]:
            self.run = None
            try:
                self.run, self._said = self.open_run(head)
            except Lacks as what:
                return {"lacks": str(what), "boot": BOOT}
            self.loads += 1
            self._opened = str(head["incarnation"])
        return {**self._said, "boot": BOOT}

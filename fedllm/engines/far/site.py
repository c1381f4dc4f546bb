"""One organisation's half of a run: a resident base model, its own rows, and the same client functions as anywhere."""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fedllm.core.client import ClientInfo
from fedllm.core.errors import FedLLMError, Withheld
from fedllm.core.layer import Layer, name_of
from fedllm.core.method import Method
from fedllm.core.payload import Payload, non_finite
from fedllm.core.program import serve
from fedllm.engines.call import Session
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall
from fedllm.engines.far.guard import Gate, Guard, Question
from fedllm.engines.far.leaving import Words, texts
from fedllm.engines.far.line import Body, Head
from fedllm.engines.far.pieces import PIECE_OPS, Pieces
from fedllm.engines.far.reasons import Refused, coded
from fedllm.engines.far.sites import PROTOCOL
from fedllm.engines.world import World, method_on
from fedllm.local.requests import Request
from fedllm.models.model import Model
from fedllm.models.sealed import Sealed
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
                 guard: Guard | None = None, known: Sequence[str] = ()) -> None:
        """`guard` is the site's own word on every answer; `known` are names that the coordinator knows, as of all who
        take part."""
        self.stack, self.world, self.info, self.memory = tuple(stack), world, info, memory
        self.guard = guard or Guard()
        own = re.findall(r"[A-Za-z_]\w*", inspect.getsource(sys.modules[type(self.stack[0]).__module__]))
        names = world.model.initial() if isinstance(world.model, Model | Sealed) else ()  # an endpoint has no tensors
        self.words = replace(Words.of([info.id, *known], names), keys=frozenset(own))
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
            raise Refused("given_up")
        if (before := self.memory.answered(attempt, visit)) is not None:
            return {"boot": BOOT}, before
        msg = codec.decode(body) if len(body) else {}
        if bad := non_finite(msg):
            raise Refused("message", f"'{bad}' of the message holds NaN or infinity")
        question, stack = self.question(head, msg)
        self.guard.begin(question, body)
        try:
            data = self._work(question, stack, msg, attempt, f"{question.phase}#{question.visit}")
        except BaseException as error:  # what it noted half-way does not count
            self.memory.drop(attempt, visit)
            if isinstance(error, GivenUp):
                raise Refused("given_up") from None
            raise
        finally:
            self.guard.end()
        self.memory.keep(attempt, visit, data)
        return {"boot": BOOT}, data

    def question(self, head: Head, msg: Payload) -> tuple[Question, list[Any]]:
        """What is asked, and the layers that stand over it: all that the run was opened with, or for a test none.

        Raises `Refused` for any other stack, and for a message from outside of a layer's session.
        """
        phase, told = str(head["phase"]), list(head["stack"])
        stack = [part for part in self.stack
                 if not (isinstance(part, Layer) and part.optional) or type(part).__name__ in told]
        names = [type(part).__name__ for part in stack]
        owner, _, name = phase.partition(".")
        at = names.index(owner) if owner in names else 0
        fn = getattr(stack[at], name, None)
        marks = getattr(fn, "__dict__", {}) if owner in names else {}
        if not marks.get("runs_on_client"):
            raise Refused("message", f"phase '{phase}' is not a client function of {names}")
        test, asker = bool(marks.get("test")), stack[at]
        own = isinstance(asker, Method) or (isinstance(asker, Layer) and asker.algebra.reads)
        repeats = math.prod([stack[0].repeats, *(layer.asks for layer in stack[1:])])
        question = Question(int(head["round"]), phase, int(head["visit"]), test, own, repeats)
        if told == names and not (test and len(names) > 1):
            self._in_session(stack, at, marks, msg)
            return question, stack
        if told == names[:1] and test:
            return question, [stack[0]]
        raise Refused("stack", f"'{phase}' was asked with the stack {told}; this run was opened with {names}")

    def _in_session(self, stack: Sequence[Any], at: int, marks: Mapping[str, Any], msg: Payload) -> None:
        """Layers below whoever asks must be at work on its answer; a layer's own question that folds nothing passes."""
        if isinstance(stack[at], Layer) and marks.get("reduce") is None:
            return
        for layer in stack[at + 1 :]:
            if layer.session and not any(key in msg for key in layer.session):
                raise Refused("stack", f"the message lacks the session of layer '{name_of(layer)}'")

    def _work(self, question: Question, stack: Sequence[Any], msg: Payload, attempt: str, visit: str) -> Body:
        """The reply in the codec's bytes, if nothing stands against it."""
        memory = self.memory.stage(attempt, question.round)
        if self._session[0] != attempt:
            self._session = attempt, Session()

        def go_on() -> None:
            if self.over or (attempt, visit) in self._dropped:
                raise GivenUp(GIVEN_UP)
            self.guard.go_on()

        def submit(request: Request) -> Any:
            go_on()
            self.guard.work(0, request.reads)
            return carry_out([request], limits)[0]

        def look(reply: Payload) -> None:
            self.guard.content(reply, self.words.more((), msg), sealed)
            self.words = self.words.more((), reply)  # a layer may lay it out in a later question

        limits = replace(self.world.limits, go_on=go_on)
        call = ClientCall(self.info, self.world, memory, question.round, question.phase, question.visit, submit,
                          self.world.model_of(self.info.id, method_on(self.stack)), self._session[1], self.guard)
        owner, _, name = question.phase.partition(".")
        part = next((p for p in stack if type(p).__name__ == owner), None)
        sealed = isinstance(part, Layer) or bool(getattr(getattr(part, name, None), "__dict__", {}).get("sealed"))
        reply = serve([stack[0], Gate(look), *stack[1:]], question.phase, msg, call, call.keep)
        go_on()
        words = self.words.more(texts(msg), [*msg, *(name for layer in stack[1:] for name in layer.names)])
        tells = [key for layer in stack[1:] for key in layer.tells]
        self.guard.reply(reply, words, sealed, tells)
        return codec.encode(reply) if reply else b""


class SiteHost:
    """Answers everything that the server may say to a site's process; no message ever raises."""

    def __init__(self, open_run: Callable[[Head], tuple[SiteRun, dict[str, Any]]],
                 tell: Callable[..., None] = lambda what, **fields: None, piece: int | None = None) -> None:
        """`open_run` makes the run that a message describes (what came with it is under `body`), or raises FedLLMError
        with the reason to refuse it. `tell` is for whoever runs this site: what is asked and what becomes of it;
        `piece` are the bytes of a piece of a long body."""
        self.open_run, self.tell = open_run, tell
        self.run: SiteRun | None = None
        self.loads = 0
        self.pieces = Pieces(piece)
        self._lock = threading.Lock()
        self._opened: str | None = None
        self._said: dict[str, Any] = {}

    def answer(self, head: Head, body: Body) -> Said:
        """The reply's envelope and body; what goes wrong is told in the envelope as a code, under `refused`."""
        try:
            if head.get("protocol") != PROTOCOL:
                return {"refused": {"code": "protocol"}}, b""
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
        except FedLLMError as error:  # what went wrong may hold rows: it stays in this site's log
            log.warning("refused: %s: %s", type(error).__name__, error)
            self._refused(head, str(error))
            return {"refused": coded(error), "boot": BOOT}, b""
        except Exception as error:
            log.exception("%s of round %s failed", head.get("phase"), head.get("round"))
            self._refused(head, f"{type(error).__name__}: {error}")
            return {"refused": coded(error), "boot": BOOT}, b""

    def _refused(self, head: Head, why: str) -> None:
        self.tell("refused", op=str(head.get("op")), phase=str(head.get("phase") or "")[:60], round=head.get("round"),
                  why="".join(c if c.isprintable() else "?" for c in why[:400]))

    def _ask(self, run: SiteRun, head: Head, body: Body) -> Said:
        phase = str(head.get("phase") or "").rpartition(".")[2][:60]
        what: dict[str, Any] = {"phase": phase, "round": head.get("round")}
        self.tell("asked", **what)
        began = time.monotonic()
        said, data = run.ask(head, body)
        self.tell("answered", **what, seconds=time.monotonic() - began, bytes=len(data))
        return said, data

    def _serve(self, head: Head, body: Body) -> Said:
        if head["op"] == "open":
            return self._open({**head, "body": body}), b""
        if self.run is None:
            return {"closed": True, "boot": BOOT}, b""
        if head["op"] == "ask":
            return self._ask(self.run, head, body)
        if head["op"] == "close":
            self.run.hear(head)
            self.tell("closed")
            return {"boot": BOOT, "loads": self.loads}, b""
        raise Refused("message", f"'{head['op']}' is nothing that a site does")

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
            raw = head.get("recipe") or {}
            self.tell("opened", run=str(raw.get("name"))[:60], rounds=raw.get("rounds"), rows=self.run.info.n,
                      method=type(self.run.stack[0]).__name__)
        return {**self._said, "boot": BOOT}

"""A federation that answers: questions over HTTP, put to a run's method at its sites, by an OpenAI-compatible API."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import EndpointError, FedLLMError, RecipeError, RunError
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.engines.far.sites import Sites
from fedllm.runs.asking import Answered, put
from fedllm.runs.course import Course
from fedllm.runs.folder import QUESTIONS
from fedllm.runs.openai_api import ApiServer, Refusal, messages, running

log = logging.getLogger(__name__)
ASKING = "asking.json"
"""In the run's folder while it answers questions: where."""
PAGE = (Path(__file__).parent / "chat.html")
LOCAL = ("127.0.0.1", "localhost")
HEAL = 2.0
"""Seconds from one look after sites that are silent to the next."""


@dataclass(frozen=True)
class Desk:
    """Where questions are taken: an address of this machine, the key that they must carry, and how long one may take.
    """

    host: str = "127.0.0.1"
    port: int = 8600
    key_env: str | None = None
    """NAME of the environment variable with the key; None: anybody who reaches the port may ask."""
    timeout: float = 120.0

    @classmethod
    def at(cls, address: str, key_env: str | None = None) -> Desk:
        """From `PORT` or `HOST:PORT`; away from this machine only with a key."""
        host, _, port = address.rpartition(":")
        host = host or "127.0.0.1"
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise RecipeError(f"--ask {address!r}: allowed is PORT or HOST:PORT, with a port from 1 to 65535")
        if host not in LOCAL and key_env is None:
            raise RecipeError(f"--ask {address!r}: anybody who reaches {host} could ask the sites; name the "
                              "environment variable of a key that questions must carry (--ask-key-env)")
        return cls(host, int(port), key_env)

    @property
    def url(self) -> str:
        """For browsers and for `fedllm ask`."""
        return f"http://{self.host}:{self.port}"


class Answering:
    """A run whose rounds are over, ready for questions: one after the other, whoever of its sites is there."""

    def __init__(self, course: Course, sites: Sites, at: int, folder: Path, timeout: float = 120.0) -> None:
        """`at` is the round whose state it answers from; `timeout` is in seconds, for each question."""
        self.course, self.sites, self.at, self.folder, self.timeout = course, sites, at, folder, timeout
        self._turn = threading.Lock()

    def refresh(self) -> None:
        """One round more, of which no record is kept: sites bring their indexes up to date."""
        course = self.course
        course.engine.record = Record()
        course.engine.begin(self.at)
        course.state = drive(course.method.round(course.state, course.clients), course.engine, course.layers,
                             course.states)
        course.engine.commit()
        self.at += 1

    def ask(self, question: str) -> Answered:
        """The answer from the sites that are there; those that were silent before are missing until they are back."""
        if not self._turn.acquire(timeout=self.timeout):
            raise RunError(f"the questions before this one took longer than timeout = {self.timeout:g} s")
        try:
            gone = {name: site.suspect for name, site in self.sites.table.items() if site.suspect}
            here = [c for c in self.course.clients if c.id not in gone]
            self.course.engine.begin(self.at)
            got = put(question, self.course, here, self.course.state, self.timeout)
            got = Answered(**{**vars(got), "missing": {**gone, **got.missing}})
            self._note(got, self.course.told())
            return got
        finally:
            self._turn.release()

    def _note(self, got: Answered, told: Mapping[str, Any]) -> None:
        """`told` is what layers say of the question: the gate's verdicts, by the hashes of what left."""
        doc = {"at": time.time(), "seconds": got.seconds, "spent": dict(got.spent), "rests": list(got.clients),
               "asked": list(got.said.get("asked", ())), "missing": dict(got.missing), "bytes": dict(got.bytes),
               **{name: told[name] for name in ("gate", "gate_rules") if name in told}}
        with (self.folder / QUESTIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(doc) + "\n")

    @contextmanager
    def healing(self) -> Iterator[None]:
        """Meanwhile sites that were silent are looked after, so that no question waits for a sign of life."""
        over = threading.Event()

        def heal() -> None:
            while not over.wait(HEAL):
                for name, site in list(self.sites.table.items()):
                    if site.suspect:
                        try:
                            self.sites.look_after(name)
                        except FedLLMError as why:
                            log.info("site '%s' is not back: %s", name, why)

        thread = threading.Thread(target=heal, name="heal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(HEAL)


class AskServer(ApiServer):
    """The API before `Answering`: the last message of a chat is the question."""

    def __init__(self, answering: Answering, name: str, desk: Desk) -> None:
        try:
            super().__init__(name, desk.host, desk.port, desk.key_env)
        except OSError as error:
            raise RunError(f"--ask: {desk.host}:{desk.port} cannot be listened on: {error.strerror or error}") from None
        self.answering, self.page = answering, PAGE.read_bytes()

    def guard(self, headers: Mapping[str, str]) -> None:
        """Refusal of what a page of somebody else's would have a browser send: no JSON, or another host's name."""
        if not headers.get("Content-Type", "").startswith("application/json"):
            raise Refusal(415, "Content-Type must be application/json")
        host = headers.get("Host", "").rpartition(":")[0]
        if self.api_key_env is None and host not in LOCAL:
            raise Refusal(403, f"without a key questions are taken for {', '.join(LOCAL)} alone")

    def health(self) -> dict[str, Any]:
        sites = self.answering.sites.table
        return {"status": "ok", "sites": {n: s.suspect or "here" for n, s in sorted(sites.items())}}

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer in the API's shape, with its sources beside it."""
        if path != "/v1/chat/completions":
            raise Refusal(404, f"{path} is not served; /v1/chat/completions is")
        if body.get("n") not in (None, 1):
            raise Refusal(400, "'n' above 1 is not offered")
        asked = [m["content"] for m in messages(body) if m["role"] == "user"]
        if not asked or not asked[-1].strip():
            raise Refusal(400, "'messages' must end with a question of the user's")
        try:
            got = self.answering.ask(asked[-1])
        except RunError as late:
            raise Refusal(504, str(late)) from None
        except EndpointError as why:  # the writer's, and no fault of who asked
            raise Refusal(502, str(why)) from None
        return told(got, self.name)


def told(got: Answered, name: str) -> dict[str, Any]:
    """An answer as the API gives it. `sources` are what it rests on, `fedllm` what it cost and who was missing."""
    text = got.answer or nothing(got)
    passages = got.said.get("passages", ())
    sources = [{"number": n, "id": p["id"], "sites": list(p["clients"]), "text": p["text"],
                "cited": n in got.said.get("cited", ())} for n, p in enumerate(passages, 1)]
    writing = sum(v for k, v in got.spent.items() if k.endswith(".write"))
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
            "model": name, "sources": sources,
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            "fedllm": {"rests_on": list(got.clients), "asked": list(got.said.get("asked", ())),
                       "missing": dict(got.missing), "left_out": got.said.get("left_out", 0),
                       "near": dict(got.said.get("near", {})), "seconds": got.seconds,
                       "writing_seconds": writing, "bytes": dict(got.bytes)}}


def nothing(got: Answered) -> str:
    """What is said where no document answers."""
    silent = f" ({', '.join(sorted(got.missing))} did not answer)" if got.missing else ""
    return f"No document of the sites that answered matches the question{silent}."


def answer_questions(answering: Answering, desk: Desk, name: str) -> None:
    """Take questions until this process ends; the run's folder says where."""
    at = answering.folder / ASKING
    server = AskServer(answering, name, desk)
    try:
        with running(server), answering.healing():
            at.write_text(json.dumps({"url": desk.url}))
            threading.Event().wait()
    finally:
        at.unlink(missing_ok=True)

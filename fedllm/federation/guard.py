"""A site's own word on every answer of a run: what may leave, how much work, how many rounds, how much privacy."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import psutil

from fedllm.core.client import Query
from fedllm.core.payload import Payload
from fedllm.engines.far.guard import Guard, Question
from fedllm.engines.far.leaving import Words
from fedllm.engines.far.line import Body
from fedllm.engines.far.reasons import Refused
from fedllm.federation.gated import only_judged
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.settings import SiteSettings
from fedllm.privacy.accountant import Release

REPEATS = 64
"""More questions of one kind than this count as rounds of their own, whatever the method's knobs say."""


class SiteGuard(Guard):
    """Holds one run to the settings of its site, and books what it answers in the site's ledger."""

    def __init__(self, settings: SiteSettings, ledger: SiteLedger, run: str, counted: bool) -> None:
        """`counted`: what the run's layers release is booked against `most_epsilon`."""
        self.settings, self.ledger, self.run, self.counted = settings, ledger, run, counted
        self.steps, self.tokens, self.since = 0, 0, time.monotonic()
        self.before: dict[str, float] = {}
        self.phase = ""

    def begin(self, question: Question, body: Body) -> None:
        mine, self.phase = self.settings, question.phase
        if question.test and not mine.tests:
            raise Refused("tests", "tests_leave is false, or follows from most_epsilon")
        self.steps, self.tokens, self.since = 0, 0, time.monotonic()
        self.before = self.ledger.read()["work"]
        self.go_on()
        if question.own and not question.test:
            key = f"{question.round} {question.visit} {hashlib.sha256(body).hexdigest()}"
            repeats = min(question.repeats, REPEATS)
            if why := self.ledger.answer(self.run, question.phase, repeats, key, mine.most_rounds, mine.rounds_in_all):
                raise Refused("rounds_spent", why)

    def content(self, reply: Payload, words: Words, sealed: bool) -> None:
        if why := self.settings.may("up", reply, words.content(), sealed):
            raise Refused("may_not_leave", why)

    def reply(self, reply: Payload, words: Words, sealed: bool, tells: Sequence[str]) -> None:
        if why := self.settings.too_large(reply):
            raise Refused("too_large", why)
        if why := self.settings.may("up", reply, words, sealed, tells):
            raise Refused("may_not_leave", why)
        if self.settings.text_leaves:
            only_judged(reply, words, sealed, tells, self.ledger.path.parent, self.run, self.phase)

    def spend(self, release: Any, count: int) -> None:
        if isinstance(release, Query) and self.settings.most_queries is not None and (
                why := self.ledger.query(self.settings.most_queries)):
            raise Refused("queries_spent", why)
        if self.counted and isinstance(release, Release):
            self.ledger.spend(release, count, self.settings.most_epsilon, self.settings.most_delta)

    def work(self, steps: int, tokens: int = 0) -> None:
        self.steps, self.tokens = self.steps + steps, self.tokens + tokens
        self.go_on()

    def go_on(self) -> None:
        mine, done = self.settings, self.done()
        for name, amount in done.items():
            for key, all_of in ((f"most_{name}", amount), (f"{name}_in_all", amount + self.before.get(name, 0))):
                most = getattr(mine, key)
                if most is not None and all_of > most:
                    raise Refused("work_spent", f"{all_of:g} {name}, {key} = {most:g}")
        if mine.most_memory_bytes is not None and (held := psutil.Process().memory_info().rss) > mine.most_memory_bytes:
            raise Refused("memory", f"this process holds {held} bytes, most_memory_bytes = {mine.most_memory_bytes}")

    def end(self) -> None:
        self.ledger.work(self.done())

    def done(self) -> dict[str, float]:
        """What the present answer has taken so far, or is about to."""
        return {"steps": self.steps, "tokens": self.tokens, "seconds": round(time.monotonic() - self.since, 3)}

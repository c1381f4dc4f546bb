"""Put questions to a method that answers them: from a run's last state, or from a recipe, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import RecipeError, RunError
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.methods.registry import method_class, modules
from fedllm.runs.build import build
from fedllm.runs.course import Course
from fedllm.runs.folder import RunFolder
from fedllm.runs.more import served
from fedllm.runs.received import received
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.sections import OWN

PATIENCE = 300.0
"""Seconds that one question, or all rounds before the first, may take."""
LONGEST = 20_000
"""Characters of a question."""


@dataclass(frozen=True)
class Answered:
    """One question's answer, whom it rests on, and what it cost."""

    question: str
    answer: str | None
    """None: nobody had anything to say."""
    clients: tuple[str, ...]
    """Whose words the answer rests on; where the method does not say, who answered it at all."""
    missing: Mapping[str, str]
    """Who was asked and gave no answer that counts, and why."""
    bytes: Mapping[str, Any]
    """`up`, `down` and `by_phase` of this question, on the wire."""
    seconds: float
    said: Mapping[str, Any] = field(default_factory=dict)
    """All that the method returned: citations, votes, scores."""
    spent: Mapping[str, float] = field(default_factory=dict)
    """Seconds from each ask to its answers, by phase: `FedRAG.lookup`, `FedRAG.write`."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Session:
    """An answering method, ready for questions."""

    def __init__(self, source: str | Path | Mapping[str, Any] | Recipe, changes: Mapping[str, Any] | None = None,
                 timeout: float = PATIENCE, trust_remote_code: bool = False) -> None:
        """`source` is a run's folder, or a recipe, whose rounds are then gone through first (nothing is written).

        Raises RecipeError for a method that answers no questions, RunError for a folder without a state.
        """
        if not timeout > 0:
            raise RecipeError(f"timeout = {timeout!r} is not allowed; it must be > 0 (seconds)")
        self.timeout = timeout
        folder = RunFolder.open(Path(source)) if isinstance(source, str | Path) and Path(source).is_dir() else None
        if folder and changes:
            raise RecipeError(f"{folder.path} is a run, whose recipe stands: {', '.join(changes)} can be changed in a "
                              "recipe alone")
        recipe = received(folder.path, trust_remote_code) if folder else load_recipe(source, changes)
        need_answers(recipe)
        if recipe.data.source == OWN or (folder and folder.at_sites):
            raise RunError(f"{source} is a run of a real federation, whose clients are not here; ask a simulation")
        self.parts = build(recipe)
        self.course = Course(self.parts, self.parts.method, self.parts.layers, Record())
        self.state: Any = None
        self.rounds = self._restore(folder) if folder else self._go()

    def _restore(self, folder: RunFolder) -> int:
        found = folder.load()
        if found is None:
            raise RunError(f"{folder.path} has no checkpoint; `fedllm resume {folder.path}` goes on with it")
        self.course.states = found[1]["layers"]
        best = served(folder) or found
        self.state, self.course.engine.memory = best[1]["state"] if best[0] else None, best[1]["memory"]
        return best[0]

    def _go(self) -> int:
        """The recipe's rounds: what a method collects before the first question."""
        ends = time.monotonic() + self.timeout
        for round in range(self.parts.recipe.rounds):
            if time.monotonic() > ends:
                raise RunError(f"round {round} of {self.parts.recipe.rounds} had not begun after timeout = "
                               f"{self.timeout:g} s; allow more, or fewer rounds")
            self.course.step(round)
            self.state = self.course.state
        return self.parts.recipe.rounds

    def ask(self, question: str) -> Answered:
        """Its answer; RunError when it takes longer than `timeout`."""
        course = self.course
        course.engine.begin(self.rounds)
        return put(question, course, course.clients, self.state, self.timeout)


def put(question: str, course: Course, clients: Sequence[ClientInfo], state: Any, timeout: float) -> Answered:
    """The answer of a run's method to a question, from these clients; its engine has begun. RunError when it takes
    longer than `timeout` seconds."""
    check_question(question)
    started, heard = time.monotonic(), Heard()
    course.engine.record = record = Record()
    answer: Any = getattr(course.method, "answer")  # noqa: B009 (only some methods have it)
    program = within(answer(question, clients, state=state), started + timeout, timeout, heard,
                     real=not course.engine.timed)
    got = drive(program, course.engine, course.layers, course.states)
    text, rested = (got, None) if isinstance(got, str) else (got.answer, got.clients)
    sent = {k: v for k, v in record.totals().items() if k != "evaluation"}
    rests = tuple(dict.fromkeys(heard.answered if rested is None else rested))
    said = asdict(got) if is_dataclass(got) and not isinstance(got, type) else {}
    return Answered(question, text or None, rests, heard.missing, sent, time.monotonic() - started, said, heard.spent)


@dataclass
class Heard:
    """Who answered a question's asks, and who did not."""

    answered: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def take(self, replies: Replies) -> None:
        """One ask's replies."""
        self.answered += [c for c in replies.answered if c != SERVER]
        self.missing |= replies.missing


def within(program: Program, ends: float, limit: float, heard: Heard, real: bool = True) -> Program:
    """The same program, none of whose asks waits longer than until `ends`; what it hears is noted.

    Where time is virtual (`real` false) deadlines are the fleet's, and only the moments between asks are looked at.
    """
    answer: Any = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as end:
            return end.value
        left = ends - time.monotonic()
        if left <= 0:
            raise RunError(f"the question took longer than timeout = {limit:g} s; allow more, ask fewer clients, or "
                           "lower method.max_new_tokens")
        cut = (lambda a: replace(a, deadline=min(left, a.deadline or left))) if real else (lambda a: a)  # noqa: B023
        began = time.monotonic()
        answer = yield cut(asked) if isinstance(asked, Ask) else [cut(a) for a in asked]
        phases = dict.fromkeys(a.phase for a in ([asked] if isinstance(asked, Ask) else asked))
        for phase in phases:
            heard.spent[phase] = heard.spent.get(phase, 0.0) + time.monotonic() - began
        for replies in [answer] if isinstance(answer, Replies) else answer:
            heard.take(replies)


def answering() -> list[str]:
    """The ids of all methods that answer questions."""
    return [name for name in modules() if "answer" in dir(method_class(name))]


def need_answers(recipe: Recipe) -> None:
    """RecipeError for a method that answers no questions."""
    name = recipe.method.name
    if "answer" not in dir(method_class(name)):
        raise RecipeError(f"method.name = {name!r} trains a model and answers no questions (`fedllm chat RUN` talks to "
                          f"what it made); allowed here are {', '.join(answering())}")


def check_question(question: Any) -> None:
    """RecipeError for what is no question."""
    if not isinstance(question, str) or not question.strip():
        raise RecipeError(f"question = {question!r} is not allowed; it must be a text that is not empty")
    if len(question) > LONGEST:
        raise RecipeError(f"the question has {len(question):,} characters; allowed are {LONGEST:,}")
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise RecipeError(f"question = {question[:80]!r} is not allowed: it holds bytes that are no UTF-8, or half a "
                          "character")


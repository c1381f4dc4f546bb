"""Tests a state: the served model on the global test, every client on its own rows, and a few answers in full."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedllm.core.ask import Program
from fedllm.core.client import SERVER
from fedllm.core.errors import BudgetSpent, QuorumError, RunError
from fedllm.core.method import Method, State
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.engines.client import server_info
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate
from fedllm.runs.build import Parts
from fedllm.runs.course import Course
from fedllm.runs.fits import overrides
from fedllm.runs.metrics import STANDARD
from fedllm.runs.pictures import named, pictured, told
from fedllm.runs.progress import Quiet
from fedllm.tasks.answers import judges_of
from fedllm.tasks.chat import wanted

Metrics = dict[str, Any]


class Judge:
    """Evaluates one method's states. Layers take no part: a test is neither trained on nor hidden."""

    def __init__(self, parts: Parts, method: Method, record: Record | None = None) -> None:
        self.parts, self.method = parts, method
        self.engine = parts.engine_over((method,), (record or Record(lambda event: None)).testing())
        # A client that misses a round is still tested, and a test takes no virtual time.
        self.engine.infos = {c: replace(i, profile=replace(i.profile, availability=1.0, dropout=0.0))
                             for c, i in self.engine.infos.items()}
        self.engine.timed = False
        self.answering = overrides(method, "answer")

    def test(self, state: State, memory: Mapping[str, Any], round: int) -> dict[str, Any]:
        """`global`: metrics on the global test (None without one); `clients`: each client's on its own rows."""
        self.engine.memory = dict(memory)
        out: dict[str, Any] = {"global": self._global(state, round), "clients": {}}
        if self.parts.recipe.evaluate.clients and (not self.answering or self.method.answers_for_clients):
            out["clients"] = self._each(state, "local", round)
        return out

    def each_with(self, state: State, memory: Mapping[str, Any], round: int) -> dict[str, Metrics]:
        """Each client's metrics on its own rows, had it this memory."""
        self.engine.memory = dict(memory)
        return self._each(state, "local", round)

    def _global(self, state: State, round: int) -> Metrics | None:
        """By the method's own `examine` or `answer`, or by the `score` that its clients use: one name, one quantity."""
        rows, method = self.parts.world.federation.test, self.method
        if not rows:
            return None
        if overrides(method, "examine"):
            self.engine.begin(round)
            return self._own(drive(method.examine(state, self.parts.world.infos(), rows), self.engine), len(rows))
        if self.answering:
            return self._answered(state, round)
        if not method.serves:
            return mean_of(self._each(state, "global", round))
        self.engine.begin(round)
        return self._replies(method.evaluate(state, [server_info()], "global")).get(SERVER)

    def _own(self, got: Any, rows: int) -> Metrics:
        """What `examine` returned, if it is what the method declares."""
        name, declared = type(self.method).__name__, self.method.metrics
        if not isinstance(got, Mapping):
            raise RunError(f"{name}.examine returned a {type(got).__name__}; allowed is a mapping of "
                           "metrics to numbers")
        known = {*declared, *STANDARD, "n"}
        if strange := [k for k in got if k not in known]:
            raise RunError(f"{name}.examine returned {strange}, which {name}.metrics does not declare; it declares "
                           f"{dict(declared)}")
        bad = {k: v for k, v in got.items() if isinstance(v, bool) or not isinstance(v, int | float)}
        if bad or (lacking := [k for k in declared if k not in got]):
            raise RunError(f"{name}.examine must give a number for each of {list(declared)}; "
                           + (f"it gave {bad}" if bad else f"it lacks {lacking}"))
        return {"n": rows, **got}

    def _answered(self, state: State, round: int) -> Metrics:
        """For a method that answers questions: each test row is one."""
        rows, clients = self.parts.world.federation.test, self.parts.world.infos()
        answer: Any = getattr(self.method, "answer")  # noqa: B009 (only some methods have it)
        self.engine.begin(round)
        judges, answered = judges_of(self.parts.recipe.evaluate.metric), 0
        right = dict.fromkeys(judges, 0.0)
        for row in rows:
            got = drive(answer(row["prompt"], clients, state=state or None), self.engine)
            said = got if isinstance(got, str) else str(got.answer or "")
            answered += bool(said.strip())
            for name, rightness in judges.items():
                right[name] += rightness(said, row["response"]) / len(rows)
        return {**right, "answered": answered, "n": len(rows)}

    def _each(self, state: State, on: str, round: int) -> dict[str, Metrics]:
        self.engine.begin(round)
        return self._replies(self.method.evaluate(state, self.parts.world.infos(), on))

    def _replies(self, program: Program) -> dict[str, Metrics]:
        try:
            replies = drive(program, self.engine)
        except QuorumError:  # every loss is NaN: the engine has recorded each
            return {}
        return {c: dict(m) for c, m in replies.items() if m.get("n")}

    def answers(self, state: State) -> list[str]:
        """The served model's answers to the sample prompts, or the labels that it gives to the pictures that are shown;
        empty where there is nothing to say."""
        world, rows = self.parts.world, sample_rows(self.parts)
        if shown := pictured(self.parts):
            return named(self.parts, self.method, state, shown)
        if not rows or not self.method.serves or self.answering:
            return []
        theta, base = self.method.served(state)
        prompts = [world.encoded(SERVER, "test")[i].prompt for i in rows]
        request = Generate(SERVER, world.model, theta, base, prompts, world.max_new_tokens)
        said = run_generates([request], world.limits)[0]
        tokenizer: Any = world.model.tokenizer
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


def sample_rows(parts: Parts) -> list[int]:
    """Indices of the test rows whose answers are kept: drawn at random, since tests often come in order."""
    world, want = parts.world, parts.recipe.evaluate.samples
    count = len(world.federation.test)
    if world.federation.acts or not world.model.rules.speaks or not want or not count:
        return []
    return sorted(numpy_stream(world.seed, "samples").choice(count, min(want, count), replace=False).tolist())


def samples(parts: Parts, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """Prompt, expected answer, and the answers before and after; of an image run with pictures (`runs/pictures.py`)."""
    if pictured(parts):
        return told(parts, before, after)
    test = parts.world.federation.test
    pairs, tokenizer = zip(sample_rows(parts), before, after, strict=False), parts.world.model.tokenizer
    return [{"prompt": str(test[i].get("prompt") or test[i].get("messages") or ""),
             "expected": wanted(test[i], tokenizer), "before": b, "after": a} for i, b, a in pairs]


def mean_of(metrics: Mapping[str, Metrics]) -> Metrics | None:
    """The plain mean over clients; `n` is the sum."""
    if not metrics:
        return None
    have = list(metrics.values())
    names = [n for n in have[0] if n != "n" and all(n in m for m in have)]
    return {n: sum(m[n] for m in have) / len(have) for n in names} | {"n": sum(m["n"] for m in have)}


def run_baseline(parts: Parts, method: Method, rounds: int, progress: Quiet) -> dict[str, Any]:
    """Another method on the same model, rows, seed and number of rounds, without layers; its evaluation."""
    course = Course(parts, method)
    with contextlib.suppress(BudgetSpent):
        for round in range(rounds):
            course.step(round)
            progress.baseline(type(method).__name__, round + 1, rounds)
    return Judge(parts, method).test(course.state, course.engine.memory, rounds)

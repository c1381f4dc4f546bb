"""The rounds of a run: who is drawn, what each round does to the state, and what happens when too few answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedllm.app.build import Parts, cohort_size
from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.client import ClientInfo
from fedllm.core.errors import PayloadError, QuorumError, RunError
from fedllm.core.layer import Layer
from fedllm.core.method import Method, State
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream

PATIENCE = 3
"""Rounds in a row that may fail for lack of answers before the run stops."""


def draw_cohort(clients: Sequence[ClientInfo], per_round: int | float, seed: int, round: int) -> list[ClientInfo]:
    """The clients asked in this round, in the data's order; the same for the same seed and round."""
    want = cohort_size(per_round, len(clients))
    if want == len(clients):
        return list(clients)
    picks = numpy_stream(seed, round, "cohort").choice(len(clients), want, replace=False)
    return [clients[i] for i in sorted(picks)]


class Course:
    """A method on its way through the rounds."""

    def __init__(self, parts: Parts, method: Method, layers: Sequence[Layer] = (), record: Record | None = None,
                 below: Sequence[Layer] = ()) -> None:
        """`below` are layers of the server alone, next to the wire."""
        self.parts, self.method, self.layers = parts, method, [*layers, *below]
        self.record = record or Record(lambda event: None)
        self.engine = parts.engine_over((method, *layers), self.record, quorum=parts.recipe.clients.quorum)
        self.clients = parts.world.infos()
        self.states = [layer.init() for layer in self.layers]
        self.state: State = method.init(parts.world.model)
        self.failed_in_a_row = 0

    def step(self, round: int) -> dict[str, Any]:
        """One round; returns what to write down about it. The touched memories are under `touched`.

        A round with too few answers, or with answers that the server cannot merge, leaves state and memories as they
        were and says so; what layers booked (privacy spent) stays booked, since the answers were given.
        """
        spec, started = self.parts.recipe, time.perf_counter()
        cohort = draw_cohort(self.clients, spec.clients.per_round, spec.seed, round)
        self.engine.begin(round)
        losses: list[float] = []
        facts: dict[str, Any] = {"round": round, "cohort": [c.id for c in cohort]}
        try:
            program = watched(self.method.round(self.state, cohort), spec.clients.deadline, losses)
            self.state = drive(program, self.engine, self.layers, self.states)
        except (QuorumError, PayloadError) as error:
            self.engine.begin(round)  # what clients noted in their memories does not count
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= PATIENCE:
                raise RunError(f"{PATIENCE} rounds in a row had too few answers that count; the last: {error}. "
                               "Lower clients.quorum or local.lr, or raise clients.per_round") from None
            return {**facts, "skipped": str(error), "seconds": time.perf_counter() - started, "touched": {}}
        self.failed_in_a_row = 0
        touched = self.engine.commit()
        return {**facts, "loss": losses[-1] if losses else None, "seconds": time.perf_counter() - started,
                "touched": touched}


def watched(program: Program, deadline: float | None, losses: list[float]) -> Program:
    """The same program, with the recipe's deadline where it names none, and its replies' mean training loss noted."""
    answer: Any = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(asked, Ask):
            answer = yield _timed(asked, deadline)
        else:
            answer = yield [_timed(a, deadline) for a in asked]
        for replies in [answer] if isinstance(answer, Replies) else answer:
            _note_loss(replies, losses)


def _timed(ask: Ask, deadline: float | None) -> Ask:
    return replace(ask, deadline=deadline) if ask.deadline is None and deadline is not None else ask


def _note_loss(replies: Replies, losses: list[float]) -> None:
    values = [r["loss"] for r in replies.each.values() if isinstance(r.get("loss"), float)]
    if replies.value is not None and isinstance(replies.value.get("loss"), float):
        values = [replies.value["loss"]]
    if values:
        losses.append(sum(values) / len(values))

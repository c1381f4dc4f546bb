"""The rounds of a run: who is drawn, what each round does to the state, and what happens when too few answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.client import ClientInfo
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, RunError
from fedllm.core.layer import Layer, name_of
from fedllm.core.method import Method, State
from fedllm.core.payload import leaves, length, non_finite
from fedllm.core.program import FARTHEST, drive
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.core.select import Turn
from fedllm.runs.build import Parts, heard_by
from fedllm.runs.fits import cohort_size
from fedllm.runs.sections import ClientsSpec
from fedllm.selectors.uniform import Uniform

PATIENCE = 3
"""Rounds in a row that may fail for lack of answers before the run stops."""


def draw_cohort(clients: Sequence[ClientInfo], per_round: int | float, seed: int, round: int) -> list[ClientInfo]:
    """The clients asked in this round where all are as likely, in the data's order; the same for the same seed and
    round."""
    want = cohort_size(per_round, len(clients))
    rng = numpy_stream(seed, round, "cohort")
    picks = Uniform().pick(Turn(clients, want, round, rng, {}, None, {}))  # type: ignore[arg-type]
    return in_order(clients, picks)


def in_order(clients: Sequence[ClientInfo], picks: Sequence[str]) -> list[ClientInfo]:
    """The picked clients in the data's order, in which answers are folded."""
    chosen = set(picks)
    return [c for c in clients if c.id in chosen]


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
        self.selector = heard_by(layers, parts.selector)
        if self.selector.hears and self.selector not in layers:
            self.selector = Uniform()  # a baseline without layers
        self.failed_in_a_row = 0

    def cohort(self, round: int) -> list[ClientInfo]:
        """Whom the selector chooses for this round; it may ask clients first."""
        spec, selector = self.parts.recipe, self.selector
        mine = next((s for x, s in zip(self.layers, self.states, strict=True) if x is selector), {})
        turn = Turn(self.clients, cohort_size(spec.clients.per_round, len(self.clients)), round,
                    numpy_stream(spec.seed, round, "cohort"), mine, self.method, self.state)
        return in_order(self.clients, drive(selector.choose(turn), self.engine))

    def report(self) -> dict[str, Any]:
        """What method, layers and clock say of the run beside its figures."""
        said = {type(x).__name__: x.report(s) for x, s in zip(self.layers, self.states, strict=True)}
        said[type(self.method).__name__] = self.method.report(self.state)
        return {name: dict(r) for name, r in said.items() if r}

    def told(self) -> dict[str, Any]:
        """What layers add to the record of the round that has just ended."""
        said = [x.facts(s) or {} for x, s in zip(self.layers, self.states, strict=True)]
        return {k: v for facts in said for k, v in facts.items()}

    def virtual(self) -> dict[str, Any] | None:
        """Virtual seconds so far, and the bytes of answers that came too late; None where time is real."""
        clock = self.engine.clock
        return {"seconds": clock.now, "wasted_bytes": clock.wasted} if self.engine.timed else None

    def step(self, round: int) -> dict[str, Any]:
        """One round; returns what to write down about it. The touched memories are under `touched`.

        A round with too few answers, or with answers that the server cannot merge, leaves state and memories as they
        were and says so; what layers booked (privacy spent) stays booked, since the answers were given.
        """
        spec, started = self.parts.recipe, time.perf_counter()
        self.engine.begin(round)
        losses: list[float] = []
        facts: dict[str, Any] = {"round": round, "cohort": []}
        try:
            cohort = self.cohort(round)
            facts["cohort"] = [c.id for c in cohort]
            program = watched(self.method.round(self.state, cohort), spec.clients, losses)
            new = drive(program, self.engine, self.layers, self.states)
            self._still(new)
            self._sound(new)
            self.state = new
        except (QuorumError, PayloadError) as error:
            touched = self.engine.abandon()  # what clients noted in their memories does not count
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= PATIENCE:
                raise RunError(f"{PATIENCE} rounds in a row had too few answers that count; the last: {error}. "
                               "Lower clients.quorum or local.lr, or raise clients.per_round") from None
            return {**facts, **self.told(), "skipped": str(error), "seconds": time.perf_counter() - started,
                    "touched": touched}
        self.failed_in_a_row = 0
        touched = self.engine.commit()
        when = {"virtual": self.engine.clock.now} if self.engine.timed else {}
        return {**facts, **self.told(), "loss": losses[-1] if losses else None,
                "seconds": time.perf_counter() - started, **when, "touched": touched}

    def _still(self, new: State) -> None:
        """CompositionError for a method that moves a stream which is frozen, by other ways than `client.fit`."""
        if not (frozen := self.parts.world.model.space.frozen):
            return
        before = dict(leaves(self.state))
        for path, leaf in leaves(new):
            stream = next((s for s in frozen if f"/{s}/" in f"/{path}"), None)
            if stream and isinstance(leaf, Tensor) and path in before and not leaf.equal(before[path]):
                raise CompositionError(f"stream '{stream}' is frozen and method '{name_of(self.method)}' changed "
                                       f"'{path}'; take it out of space.frozen, or use a method that trains by "
                                       "gradients")

    def _sound(self, new: State) -> None:
        """PayloadError where what is trained has become no numbers, or is farther off than an answer may be: a rate of
        the server's does that to answers of which each is sound."""
        old, made = ({p: v for p, v in leaves(state) if p.partition("/")[0] == "theta"} for state in (self.state, new))
        why = "what the server makes of the answers"
        if bad := non_finite(made):
            raise PayloadError(f"{why} holds NaN or infinity in '{bad[:80]}'; lower the rates (method.server_lr, "
                               "local.lr)")
        far = FARTHEST * max(1.0, length(old))
        if not (long := length(made)) <= far:
            raise PayloadError(f"{why} is {long:.3g} long, allowed is {far:.3g}; lower the rates (method.server_lr, "
                               "local.lr), or the noise")


def watched(program: Program, terms: ClientsSpec, losses: list[float]) -> Program:
    """The same program, with the recipe's deadline and quorum where it names none, and its replies' mean training loss
    noted."""
    answer: Any = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(asked, Ask):
            answer = yield _settled(asked, terms)
        else:
            answer = yield [_settled(a, terms) for a in asked]
        for replies in [answer] if isinstance(answer, Replies) else answer:
            _note_loss(replies, losses)


def _settled(ask: Ask, terms: ClientsSpec) -> Ask:
    return replace(ask, deadline=terms.deadline if ask.deadline is None else ask.deadline,
                   quorum=terms.quorum if ask.quorum is None else ask.quorum)


def _note_loss(replies: Replies, losses: list[float]) -> None:
    values = [r["loss"] for r in replies.each.values() if isinstance(r.get("loss"), float)]
    if replies.value is not None and isinstance(replies.value.get("loss"), float):
        values = [replies.value["loss"]]
    if values:
        losses.append(sum(values) / len(values))

"""Foresee what a run will cost: run a small slice of it on the real engine, and work out the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.core.client import ClientInfo
from fedllm.core.errors import FedLLMError
from fedllm.core.method import Method, State
from fedllm.core.record import Record, summed
from fedllm.data.federation import Federation
from fedllm.engines.world import World
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.runs.build import Parts, build, make_facts
from fedllm.runs.course import Course, draw_cohort
from fedllm.runs.crossed import Bytes, Crossed
from fedllm.runs.judge import Judge
from fedllm.runs.made import rules_in
from fedllm.runs.meter import Meter
from fedllm.runs.progress import log as progress
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.rows import look
from fedllm.runs.thin import Thin, say_size
from fedllm.runs.training import cautions

PER_ROUND_OVERHEAD = 0.02
"""Seconds of a checkpoint and of bookkeeping."""

PEAK = 1.25
"""The run's peak memory by the slice's: it meets batches of more lengths. Measured on six recipes: 1.22 to 1.42."""


@dataclass(frozen=True)
class Plan:
    """What the run is expected to need."""

    up: int
    """Bytes on the wire from clients to server, of the rounds."""
    down: int
    by_phase: Mapping[str, Mapping[str, int]]
    seconds: float
    """Of the run itself; baselines are in `seconds_baselines`."""
    seconds_baselines: float
    peak_memory_bytes: int
    rounds: int
    cohort: int
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """`up`, `down` and `by_phase` of what is sent to test."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """The method's own metrics: name -> "max" or "min"."""
    privacy: Sequence[Mapping[str, Any]] = ()
    """Of each layer that accounts for privacy: `epsilon` at `delta` of the whole run, the `noise_multiplier` that it
    takes, and `rounds_that_fit` into the budget, if there is one."""

    cautions: Sequence[str] = ()
    """What of the data may not be meant: rows that are cut, columns that nobody reads."""

    @property
    def epsilon(self) -> float | None:
        """Privacy that will be spent, the largest over the layers; None without a layer that accounts for it."""
        return max((float(p["epsilon"]) for p in self.privacy), default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "epsilon": self.epsilon}


MOST_DRAWN = 10_000
"""Rounds of which it is drawn who is asked; further ones are as these are."""


@dataclass(frozen=True)
class Probe:
    """One probed round: bytes and seconds."""

    bytes: Bytes
    seconds: float


@dataclass(frozen=True)
class Probed:
    """What the slice told."""

    by_round: list[Bytes]
    """Of rounds 0, 1 and 2, at one local step."""
    per_step: Bytes
    """Of each further step."""
    warm_up: float
    """Seconds that only the first round takes."""
    seconds: float
    """Of a whole round."""
    course: Course
    back: Bytes
    """What a client is sent, or sends, that missed a round, by the same of one that did not."""


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Plan:
    """Probe a recipe and predict bytes, seconds and peak memory; nothing is written."""
    checked = load_recipe(recipe, overrides)
    say_size(checked)
    return plan_parts(build(checked))


def plan_parts(parts: Parts) -> Plan:
    """The same for parts that are built.

    Rounds 0, 1 and 2 are probed with one local step (methods may send other things first, or by turns), and round 2
    once more with several: the difference is what a step costs, whatever the method makes of it.
    """
    recipe, meter = parts.recipe, Meter()
    said = [*parts.world.federation.cautions, *look(parts), *cautions(parts.world.local)]
    progress.info("plan: %d clients have %d rows; a slice of the run is tried", len(parts.world.infos()),
                  sum(c.n for c in parts.world.infos()))
    drawn = min(recipe.rounds, MOST_DRAWN)
    cohorts = [draw_cohort(parts.world.infos(), recipe.clients.per_round, recipe.seed, r) for r in range(drawn)]
    asked = max((len(c) for c in cohorts), default=0)
    steps = _mean_steps(parts)
    thin = Thin.of(parts, asked, max(3, min(12, round(steps / 4))))
    small = thin.local(_slice(parts, asked, thin))
    probed = _probe(small, small.method, small.layers, steps, thin, asked < len(parts.world.infos()))
    said += [f"layers.{i}: {why}" for i, layer in enumerate(small.layers) for why in layer.warns(steps, thin.more)]
    progress.info("plan: the rounds are tried (%.1f s each); now a test", probed.seconds)
    share, there, stays = asked / max(1, len(small.world.federation.clients)), *_odds(parts)
    total: Bytes = defaultdict(float)
    for r in range(drawn):
        stay = _stayed(cohorts, r)
        alike = (recipe.rounds - 1) / (drawn - 1) if r else 1.0  # rounds that this one stands for
        for key, size in probed.by_round[0 if r == 0 else 1 + (r + 1) % 2].items():
            size *= stay + (1 - stay) * probed.back.get(key, 1.0)
            odds = there * (stays if key[0] == "up" else 1.0)
            total[key] += alike * share * odds * (size + probed.per_step[key] * (steps - 1))
    tests = _tests(recipe)
    first, first_seconds = _probe_test(parts, small, small.method.init(small.world.model), {})
    later, test_seconds = _probe_test(parts, small, probed.course.state, probed.course.engine.memory)
    of_tests: Bytes = {key: first[key] + (tests - 1) * later[key]  # a state may weigh more once there was a round
                       for key in first.keys() | later.keys()}
    spent = probed.warm_up + recipe.rounds * (probed.seconds * share + PER_ROUND_OVERHEAD)
    spent += first_seconds + (tests - 1) * test_seconds
    extra = sum(_baseline_seconds(small, name, steps, thin) * share * recipe.rounds + test_seconds
                for name in recipe.evaluate.baselines if not rules_in([name]))
    peak = round(PEAK * meter.peak()) if thin.batch is None else meter.peak() + thin.missing
    sent = summed(total)
    rows = {c.id: c.n for c in parts.world.infos()}
    facts = replace(make_facts(recipe, rows, parts.world.local), size=_size(parts.world.model))
    foreseen = {i: says for i, layer in enumerate(parts.layers) if (says := layer.foresee(facts))}
    said += [f"layers.{i}: {why}" for i, layer in enumerate(parts.layers) for why in (
        *layer.doubts(asked, there * stays), *_too_long(layer, foreseen.get(i), recipe.rounds))]
    return Plan(sent["up"], sent["down"], sent["by_phase"], spent, extra, peak, recipe.rounds,
                asked, summed(of_tests), dict(parts.method.metrics), list(foreseen.values()), said)


def _too_long(layer: Any, says: Mapping[str, Any] | None, rounds: int) -> list[str]:
    """Where a budget ends before the rounds do."""
    fits = None if says is None else says.get("rounds_that_fit")
    if says is None or fits is None or fits >= rounds:
        return []
    return [f"{rounds} rounds would cost epsilon {says['epsilon']:.3g}, and the budget is {layer.epsilon:g}: the run "
            f"will end after {fits} of them; leave noise_multiplier out, and it follows from epsilon and rounds"]


def _size(model: Any) -> int:
    return sum(t.numel() for t in model.initial().values()) if isinstance(model, Model) else 0


def _tests(recipe: Recipe) -> int:
    every, rounds = recipe.evaluate.every, recipe.rounds
    return 1 if not rounds else 2 + (sum(1 for r in range(1, rounds) if r % every == 0) if every else 0)


def _mean_steps(parts: Parts) -> float:
    local, clients = parts.world.local, parts.world.infos()
    return sum(local.count(c.n) for c in clients) / len(clients)


def _odds(parts: Parts) -> tuple[float, float]:
    """Of a client that is asked: that it begins, and that it is not lost before it sends. In virtual time it is
    lost while it works or sends, and all of its message is counted."""
    clients = parts.world.infos()
    lost = 0.0 if parts.world.fleet else sum(c.profile.dropout for c in clients) / len(clients)
    return sum(c.profile.availability for c in clients) / len(clients), 1 - lost


def _slice(parts: Parts, asked: int, thin: Thin) -> Parts:
    """The same run with some of its clients (spread over their sizes), always there, and few test rows."""
    world, federation = parts.world, parts.world.federation
    infos = sorted(world.infos(), key=lambda c: c.n)
    want = max(1, min(thin.clients, asked, len(infos)))
    chosen = {infos[(2 * i + 1) * len(infos) // (2 * want)].id for i in range(want)}
    clients = {c: replace(s, test=s.test[: thin.client_rows]) for c, s in federation.clients.items() if c in chosen}
    small = replace(federation, clients=clients, test=federation.test[: thin.test_rows])
    profiles = {c.id: replace(c.profile, availability=1.0, dropout=0.0) for c in infos}
    recipe = parts.recipe.model_copy(
        update={"clients": parts.recipe.clients.model_copy(update={"per_round": 1.0, "quorum": 1, "deadline": None})})
    layers = [layer.unlimited() for layer in parts.layers]
    return replace(parts, world=_world(world, small, profiles), recipe=recipe, layers=layers)


def _world(world: World, federation: Federation, profiles: Mapping[str, Any], steps: int | None = None) -> World:
    local = replace(world.local, steps=steps, warmup=0) if steps else world.local  # no rate is of interest
    return replace(world, federation=federation, profiles=profiles, local=local)


def _probe(small: Parts, method: Method, layers: list[Any], steps: float,
           thin: Thin, misses: bool = False) -> Probed:
    """Rounds 0, 1 and 2 at one step, and round 2 once more at `thin.more`; `misses`: clients may miss rounds."""
    more = thin.more
    few, many = _with_steps(small, 1), _with_steps(small, more)
    course, seen = Course(few, method, layers), Crossed()
    course.record.sink = seen
    probes, state = [], course.state
    for round in range(3):
        state = course.state
        probes.append(_round(course, round, seen))
    course.state, course.engine.world = state, many.world
    again = _round(course, 2, seen)
    per_step: Bytes = defaultdict(float)
    for key in probes[2].bytes:
        per_step[key] = (again.bytes[key] - probes[2].bytes[key]) / (more - 1)
    slope = max(0.0, again.seconds - min(probes[1].seconds, probes[2].seconds)) / (more - 1)
    quick = min(probes[1].seconds, probes[2].seconds)
    back = _returning(course, few, seen) if misses else {}
    whole = quick + slope * (thin.times * steps - 1)
    return Probed([p.bytes for p in probes], per_step, max(0.0, probes[0].seconds - quick), whole, course, back)


def _stayed(cohorts: Sequence[Sequence[ClientInfo]], r: int) -> float:
    """Share of round r's clients that were asked in the round before too; all of them in the first."""
    before = {c.id for c in cohorts[r - 1]} if r else {c.id for c in cohorts[r]}
    return sum(c.id in before for c in cohorts[r]) / max(1, len(cohorts[r]))


def _returning(course: Course, few: Parts, seen: Crossed) -> Bytes:
    """Round 3 with some clients left out, and round 4 with all of them: what those weigh that come back."""
    everyone = course.clients
    stayed = everyone[::2]
    if len(stayed) == len(everyone):
        return {}
    course.engine.world = few.world
    try:
        course.clients = stayed
        course.step(3)
        course.clients, seen.each = everyone, defaultdict(float)
        course.step(4)
    except FedLLMError:  # layers that need more clients than stayed send the same to everybody
        return {}
    finally:
        course.clients = everyone
    there = {c.id for c in stayed}
    sizes: dict[tuple[str, str], dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for (way, phase, client), size in seen.each.items():
        sizes[way, phase][client in there].append(size)
    return {key: (sum(x[False]) / len(x[False])) / (sum(x[True]) / len(x[True]))
            for key, x in sizes.items() if x[True] and x[False]}


def _with_steps(parts: Parts, steps: int) -> Parts:
    world = parts.world
    return replace(parts, world=_world(world, world.federation, world.profiles, steps))


def _round(course: Course, round: int, seen: Crossed) -> Probe:
    seen.bytes, started = defaultdict(float), time.perf_counter()
    course.step(round)
    return Probe(seen.bytes, time.perf_counter() - started)


def _probe_test(parts: Parts, small: Parts, state: State, memory: Mapping[str, Any]) -> tuple[Bytes, float]:
    """Bytes and seconds of one whole test, from one on few rows."""
    seen = Crossed()
    judge = Judge(small, small.method, Record(seen))
    whole, part = parts.world.federation, small.world.federation
    started = time.perf_counter()
    judge.test(state, memory, 0)
    seconds = time.perf_counter() - started
    clients = len(whole.clients) / len(part.clients)
    rows = _rows(whole) / max(1, _rows(part))
    return defaultdict(float, {key: size * clients for key, size in seen.bytes.items()}), seconds * rows


def _rows(federation: Federation) -> int:
    return len(federation.test) + sum(len(s.test) for s in federation.clients.values())


def _baseline_seconds(small: Parts, name: str, steps: float, thin: Thin) -> float:
    return _probe(small, make_method(name), [], steps, thin).seconds


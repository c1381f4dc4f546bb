"""The shape of what each command prints with --json, as JSON Schemas: `fedllm schema [COMMAND]`."""

from __future__ import annotations

import difflib
from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from fedllm.core.errors import RecipeError


class Begin(TypedDict):
    """The run begins, or goes on after `done` rounds."""

    event: Literal["begin"]
    rounds: int
    done: int


class Note(TypedDict):
    """What the run is doing now."""

    event: Literal["note"]
    text: str


class Progress(TypedDict):
    """Inside of a round, at most once a second; and as it ends, with its loss."""

    event: Literal["progress", "round"]
    round: int
    of: int
    steps: float
    steps_expected: float
    clients: int
    answered: int
    missing: int
    tokens_per_second: float | None
    seconds_left: float | None
    loss: NotRequired[float | None]
    seconds: NotRequired[float | None]
    skipped: NotRequired[str | None]


class Test(TypedDict):
    """The global test after so many rounds."""

    event: Literal["test"]
    round: int
    figures: dict[str, float]


class Baseline(TypedDict):
    """A baseline has done so many of its rounds."""

    event: Literal["baseline"]
    name: str
    done: int
    of: int


class Ended(TypedDict):
    """The last line: all of result.json, and the run's folder."""

    event: Literal["result"]
    folder: str
    method: str
    rounds: int
    evaluation: dict[str, Any]
    bytes: dict[str, Any]
    privacy: Any
    state_digest: str
    seconds: float
    skipped: list[int]


class Planned(TypedDict):
    """Bytes, seconds and memory of the run; with --propose `tried` and `overrides` instead."""

    up: NotRequired[int]
    down: NotRequired[int]
    by_phase: NotRequired[dict[str, dict[str, int]]]
    seconds: NotRequired[float]
    seconds_baselines: NotRequired[float]
    peak_memory_bytes: NotRequired[int]
    rounds: NotRequired[int]
    cohort: NotRequired[int]
    evaluation: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, str]]
    privacy: NotRequired[list[dict[str, Any]]]
    cautions: NotRequired[list[str]]
    epsilon: float | None
    delta: NotRequired[float]
    tried: NotRequired[list[dict[str, Any]]]
    overrides: NotRequired[list[str]]


class MethodFacts(TypedDict):
    """One method's card, claim and knobs; one object a line."""

    id: str
    title: str
    paper: str
    topic: str
    sends: str
    needs: str
    moves: dict[str, Any] | None
    claim: dict[str, Any]
    knobs: dict[str, Any]
    file: str


class Replayed(TypedDict):
    """The server run again from the record; with --without what is left of the client."""

    folder: str
    rounds: int
    state_digest: str
    reducer: NotRequired[str]
    same: NotRequired[bool]
    distance: NotRequired[float]
    client: NotRequired[str]
    first_answered: NotRequired[int]
    taken: NotRequired[int]
    asked: NotRequired[int]
    bytes: NotRequired[dict[str, int]]
    still_held_in_the_run: NotRequired[dict[str, str]]
    tests: NotRequired[dict[str, Any]]


class Key(TypedDict):
    """One key of a recipe."""

    key: str
    type: str
    default: str
    does: str


class Advised(TypedDict, total=False):
    methods: list[dict[str, Any]]
class Keys(TypedDict):
    keys: list[Key]
class Report(TypedDict):
    report: str
class Address(TypedDict):
    address: str
class Told(TypedDict):
    told: list[str]
class Exported(TypedDict):
    model: str
class Said(TypedDict):
    typed: str
    model: Literal["run", "base"]
    answer: str
class Grouped(TypedDict):
    groups: int
    rows: int
    bytes: int
    folder: str
class Joining(TypedDict):
    joining: str
    data: str
class Line(TypedDict):
    line: str
class Stopped(TypedDict):
    ended: int
    run: str
class Kits(TypedDict):
    kits: str
    secret: NotRequired[str]
class Site(TypedDict):
    site: str
    state: Literal["suspended", "restored", "revoked"]
class Sealed(TypedDict):
    sealed: int
    findings: list[str]
class AuditKey(TypedDict):
    key: str
class Verified(TypedDict):
    intact: bool
    findings: list[str]
    events: int
    finished: bool
    head: str
class Status(TypedDict):
    run: str
    state: str
    method: str
    rounds: int
    of: int
    last_round_seconds: float | None
    resumed: int
    skipped: int
    up: int
    down: int
    sites: dict[str, dict[str, Any]]
class Audited(TypedDict):
    checks: list[dict[str, Any]]
    left_out: dict[str, Any]
class Asked(TypedDict):
    question: str
    answer: str
    clients: list[str]
    missing: dict[str, str]
    bytes: dict[str, Any]
    seconds: float
class Judged(TypedDict):
    kind: Literal["judge"]
    wins: int
    ties: int
    losses: int
    file: str
class Measured(TypedDict):
    file: str
class Compliance(TypedDict):
    of: str
    demands: dict[str, Any]
    rules: list[str]
    lines: list[dict[str, Any]]
    pieces: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    without_a_gate: list[str]


class Origin(TypedDict):
    margin: float
    origin: list[str | None]


class Compared(TypedDict):
    event: str
Schemas = dict[str, Any]
RUN = Begin | Note | Progress | Test | Baseline | Ended

SHAPES: dict[str, Any] = {
    "run": RUN, "resume": RUN, "demo": RUN, "serve": Ended, "plan": Planned, "methods": MethodFacts,
    "replay": Replayed, "recipe": Keys, "report": Report, "dashboard": Address, "track": Told, "export": Exported,
    "chat": Said, "group": Grouped, "schema": Schemas, "join": Joining, "status": Status, "logs": Line,
    "stop": Stopped, "keys new": Kits, "keys add": Kits, "keys suspend": Site, "keys restore": Site,
    "keys revoke": Site, "audit run": Audited, "audit verify": Verified, "audit seal": Sealed, "audit key": AuditKey,
    "advise": Advised, "ask": Asked, "compare": Compared, "compliance": Compliance, "origin": Origin,
    "evaluate": Measured, "judge": Judged}
"""Command -> what a line of its output is."""


def schemas() -> dict[str, Any]:
    """All of them by command."""
    return {name: schema_of(name) for name in SHAPES}


def schema_of(command: str) -> dict[str, Any]:
    """The JSON Schema of one command's output, one object a line; it may hold more keys than are told."""
    if command not in SHAPES:
        near = difflib.get_close_matches(command, SHAPES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise RecipeError(f"'{command}' is no command with --json{hint} Allowed are {', '.join(SHAPES)}")
    return TypeAdapter(SHAPES[command]).json_schema()


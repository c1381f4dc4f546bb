"""Take a client out of a finished run, exactly: replies that could not hang on it come from the tape, the rest is asked
anew, and the model is the one that the others come to by themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.core.errors import CompositionError, PayloadError, QuorumError, RecipeError, RunError
from fedllm.core.layer import name_of
from fedllm.core.payload import Tree, digest
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.engines.world import World
from fedllm.runs.began import same_as_began, stands_on
from fedllm.runs.build import Parts, build
from fedllm.runs.course import PATIENCE, in_order, watched
from fedllm.runs.fits import cohort_size
from fedllm.runs.folder import RunFolder
from fedllm.runs.halves import Now, Then
from fedllm.runs.products import safe, write_clients, write_served
from fedllm.runs.received import received
from fedllm.runs.recipe import Recipe
from fedllm.runs.sections import OWN
from fedllm.runs.store import read_json, reading
from fedllm.runs.tape import check_taped

log = logging.getLogger(__name__)
FILE = "removed.json"
PLAIN = ("plain", "codec", "robust", "line", "meter")
"""Kinds of layers under which a kept reply can be folded again without one of the others."""
LEARNED = "a model that learned from it"
HOLDERS = {"replies": "its replies", "checkpoints": "states and memories that it changed",
           "events.jsonl": "its id, and when it answered",
           "samples.json": f"answers of {LEARNED}, and pictures of its rows where evaluate.pictures is 'private'",
           "adapter": LEARNED, "model": LEARNED, "trainables": LEARNED, "modules": LEARNED}
"""What in a run's folder still holds a client that was removed."""


@dataclass(frozen=True)
class Removed:
    """A run without one of its clients."""

    folder: Path
    client: str
    first: int
    """The first round in which it answered: all before is as it was."""
    rounds: int
    taken: int
    """Replies of the others that came from the tape."""
    asked: int
    """Replies that were asked anew."""
    bytes: Mapping[str, int]
    """What asking anew put on the wire, up and down."""
    state_digest: str
    holds: Mapping[str, str]
    """What in the run's folder still holds the client, and what it is."""
    parts: Parts = field(repr=False, compare=False)
    """With the client's rows, for tests of what is left of it."""
    before: tuple[Tree, Tree | None] = field(repr=False, compare=False)
    after: tuple[Tree, Tree | None] = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        return {"client": self.client, "first_answered": self.first, "rounds": self.rounds, "taken": self.taken,
                "asked": self.asked, "bytes": dict(self.bytes), "state_digest": self.state_digest,
                "still_held_in_the_run": dict(self.holds)}


def remove(path: str | Path, client: str, trust_remote_code: bool = False) -> Removed:
    """The run's rounds gone through again without `client`, in the same cohorts less the client and with the same
    seeds; what is served then goes to `without-<client>/` in the run's folder, with `removed.json`.

    A reply is taken from the tape where the client that gave it was told the same, bit for bit, and remembered the
    same; else it is asked for again. The run itself stays as it is. Raises RecipeError for a client that is not there
    or is the only one, RunError for one that never answered or a run that kept no replies, CompositionError where what
    was kept cannot be folded without it.
    """
    folder = RunFolder.open(Path(path))
    with folder.held():
        recipe = received(folder.path, trust_remote_code)
        rounds = _check_recipe(folder, recipe)
        parts = build(recipe)
        same_as_began(folder, stands_on(parts))
        first = _check_client(folder, parts, client, rounds)
        again = Again(folder, parts, client, rounds)
        state = again.go()
        out = folder.path / f"without-{safe(client)}"
        out.mkdir(exist_ok=True)
        made = RunFolder(out)
        write_served(made, parts.world.model, parts.method, state)
        write_clients(made, parts.world.model_of, again.memories())
        sent = again.record.totals()
        before, after = (parts.method.served(s) if parts.method.serves else ({}, None)
                         for s in (again.last["state"], state))
        done = Removed(out, client, first, rounds, again.now.taken, again.now.asked,
                       {way: sent[way] for way in ("up", "down")}, digest(state), _holds(folder, client), parts,
                       before, after)
        made.write_json(FILE, done.as_json())
        made.close_to_others()
        return done


class Again:
    """The rounds of a run, as they were and without a client, side by side."""

    def __init__(self, folder: RunFolder, parts: Parts, client: str, rounds: int) -> None:
        self.folder, self.parts, self.client, self.rounds = folder, parts, client, rounds
        self.record = Record(lambda event: None)
        method, quorum = parts.method, parts.recipe.clients.quorum
        with reading(folder.path):
            begun, alike = folder.load(0)[1], folder.load(0)[1]  # type: ignore[index]
            self.last = folder.load()[1]  # type: ignore[index]
            self.asked = {e["round"]: e["cohort"] for e in folder.events() if e["kind"] == "round"}
        self.stack = parts.layers
        self.states = [begun["layers"][: len(self.stack)], alike["layers"][: len(self.stack)]]
        self.then_state, self.state = begun["state"], alike["state"]
        rest = without_rows(parts.world, client)
        self.clients = parts.world.infos()
        kept = set(folder.rounds()) >= set(range(rounds))
        remember = {c for c, m in self.last["memory"].items() if m}

        def memory(client: str, round: int) -> Mapping[str, Any]:
            """What the client remembered before this round, while nothing that it was told had changed."""
            return dict(folder.load(round)[1]["memory"].get(client, {})) if kept else {}  # type: ignore[index]

        self.then = Then(folder.path / "replies", quorum, parts.engine_over((method, *self.stack), Record()))
        real = replace(parts, world=rest).engine_over((method, *self.stack), self.record, quorum=quorum)
        self.now = Now(real, quorum, memory, () if kept else remember)

    def go(self) -> Any:
        """Every round; the state that the others come to."""
        failed = 0
        for round in range(self.rounds):
            self.then.begin(round)
            cohort = in_order(self.clients, self.asked[round])
            then, _ = self._step(self.then_state, cohort, self.then, self.states[0])
            self.then.end(then is not None)
            self.now.begin(round, self.then.asked)
            rest = [c for c in cohort if c.id != self.client]
            now, why = self._step(self.state, rest, self.now, self.states[1]) if rest else (None, "nobody was asked")
            self.now.end(counts=(then is not None, now is not None), but=self.client)
            self.then_state = self.then_state if then is None else then
            self.state, failed = (self.state, failed + bool(rest)) if now is None else (now, 0)
            if failed >= PATIENCE:
                raise RunError(f"without '{self.client}' {PATIENCE} rounds in a row had too few answers that count; "
                               f"the last: {why}")
        return self.state

    def memories(self) -> dict[str, Any]:
        """What each of the others remembers: of those that were asked nothing anew, what they remembered."""
        new, old = self.now.real.memory, self.last["memory"]
        return {c.id: dict((new if c.id in self.now.anew else old).get(c.id, {})) for c in self.clients
                if c.id != self.client}

    def _step(self, state: Any, cohort: Sequence[Any], engine: Any, states: list[Any]) -> tuple[Any, str]:
        """The next state, or None and why the round does not count."""
        program = watched(self.parts.method.round(state, cohort), self.parts.recipe.clients, [])
        try:
            return drive(program, engine, self.stack, states), ""
        except (QuorumError, PayloadError) as error:
            return None, str(error)


def without_rows(world: World, client: str) -> World:
    """The same world, in which this client never was."""
    left = {c: s for c, s in world.federation.clients.items() if c != client}
    return replace(world, federation=replace(world.federation, clients=left))


def _check_recipe(folder: RunFolder, recipe: Recipe) -> int:
    """How many rounds the run had; refuses what cannot be gone through again exactly."""
    at = folder.path
    if recipe.data.source == OWN or folder.at_sites:
        raise RunError(f"{at} is a run of a real federation, whose rows are at the sites: serve the recipe again "
                       "without the one that leaves")
    if not recipe.record.replies:
        raise RunError(f"{at} kept no replies; run the recipe with record.replies=true, or again without the client")
    if not (at / "result.json").is_file():
        raise RunError(f"{at} is not finished; `fedllm resume {at}` goes on with it")
    if recipe.select.name != "uniform":
        raise CompositionError(f"select.name = {recipe.select.name!r}: whom it chose hung on what the client said, so "
                               "its cohorts say something of it; run the recipe again without the client (only "
                               "'uniform' draws blindly)")
    if recipe.clients.step_seconds is not None:
        raise CompositionError(f"clients.step_seconds = {recipe.clients.step_seconds:g}: in virtual time who was late "
                               "hung on the client; run the recipe again without it")
    if recipe.evaluate.keep_best or recipe.evaluate.patience:
        key = "keep_best" if recipe.evaluate.keep_best else "patience"
        raise CompositionError(f"evaluate.{key}: which round was the best hung on the client; run the recipe again "
                               "without it")
    rounds = read_json(at / "result.json")["rounds"]
    lost = [r for r in range(rounds) if not (at / "replies" / f"{r:06d}.json").is_file()]
    if lost:
        raise RunError(f"{at}: the replies of round {lost[0]} are not there; run the recipe again without the client")
    return rounds


def _check_client(folder: RunFolder, parts: Parts, client: str, rounds: int) -> int:
    """The first round in which it answered."""
    ids = [] if parts.world.federation.streamed else list(parts.world.federation.clients)
    if not ids:
        raise CompositionError(f"data.source = {parts.recipe.data.source!r} streams its clients: run the recipe again "
                               "without the one that leaves")
    if client not in ids:
        raise RecipeError(f"client = {client!r} is not allowed; it must be a client of the run: {', '.join(ids[:8])}"
                          f"{', ..' if len(ids) > 8 else ''}")
    if len(ids) < 2:
        raise RecipeError(f"client = {client!r} is the only client; nobody would be left, and what is without it is "
                          "the starting model")
    if {c["id"]: c["n"] for c in folder.read("clients.json")} != {c.id: c.n for c in parts.world.infos()}:
        raise RunError(f"{folder.path}: clients.json and the rows of data.source do not fit together; bring the rows "
                       "of the run back, since those who stay may be asked anew")
    check_taped(parts.method)
    if parts.method.by_arrival:
        raise CompositionError(f"method '{parts.recipe.method.name}' goes by who answers first, which hung on the "
                               "client; run the recipe again without it")
    for layer in parts.layers:
        if layer.algebra.kind not in PLAIN:
            raise CompositionError(f"layer '{name_of(layer)}': its replies were masked, noised or changed, and "
                                   "cannot be folded without one of them; run the recipe again without the client")
    parts.method.check_clients([c for c in ids if c != client],
                               cohort_size(parts.recipe.clients.per_round, len(ids) - 1))
    for round in range(rounds):
        if any(client in ask["clients"] for ask in read_json(folder.path / "replies" / f"{round:06d}.json")):
            return round
    raise RunError(f"client = {client!r} never answered in rounds 0 to {rounds - 1}: there is nothing of it to remove")


def _holds(folder: RunFolder, client: str) -> dict[str, str]:
    found = {name: what for name, what in HOLDERS.items() if (folder.path / name).exists()}
    mine = folder.path / "clients" / safe(client)
    return found | ({f"clients/{safe(client)}": "its own memory"} if mine.exists() else {})

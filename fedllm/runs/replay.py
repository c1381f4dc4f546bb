"""Run the server again from the replies that a run kept, with the same reducer or another: no client, no data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.core.client import ClientInfo, Profile
from fedllm.core.errors import QuorumError, RecipeError, RunError
from fedllm.core.payload import Tree, digest, norm, sub
from fedllm.core.program import drive
from fedllm.core.reduce import Mean, Reducer
from fedllm.defenses.median import Median
from fedllm.methods.registry import make_method
from fedllm.runs.build import make_recipe_space, recipe_model
from fedllm.runs.course import draw_cohort, in_order
from fedllm.runs.folder import RunFolder
from fedllm.runs.layers import make_layer
from fedllm.runs.products import write_served
from fedllm.runs.received import received
from fedllm.runs.store import reading
from fedllm.runs.tape import Playback, check_taped

log = logging.getLogger(__name__)
REDUCERS: dict[str, Reducer] = {"mean": Mean(), "uniform": Mean(by="uniform"), "median": Median()}


@dataclass(frozen=True)
class Replayed:
    """What the server comes to this time."""

    folder: Path
    reducer: str
    rounds: int
    state_digest: str
    same: bool
    """Whether it is the recorded state, bit for bit."""
    distance: float
    """L2 distance between the served trainables and the recorded ones, relative to how far the run had moved."""


def replay(path: str | Path, reducer: str | None = None, trust_remote_code: bool = False) -> Replayed:
    """Fold the recorded replies again; the served model goes to `replay-<reducer>/` in the run's folder.

    Raises RunError when the run kept no replies, CompositionError when the method cannot use another reducer.
    """
    if reducer is not None and reducer not in REDUCERS:
        raise RecipeError(f"reducer = {reducer!r} is unknown; allowed are {', '.join(REDUCERS)}")
    folder = RunFolder.open(Path(path))
    with reading(folder.path):
        return _again(folder, reducer, trust_remote_code)


def _again(folder: RunFolder, reducer: str | None, trust_remote_code: bool) -> Replayed:
    recipe = received(folder.path, trust_remote_code)
    if not recipe.record.replies:
        raise RunError(f"{folder.path} kept no replies; run the recipe with record.replies=true")
    method = make_method(recipe.method.name, **recipe.method.knobs)
    check_taped(method)
    layers = [make_layer(x.name, x.knobs, f"layers.{i}") for i, x in enumerate(recipe.layers)]
    first = folder.load(0)
    last = folder.load()
    done = folder.path / "result.json"  # a budget may have ended the run before the recipe's last round
    rounds = folder.read(done.name)["rounds"] if done.is_file() else recipe.rounds
    if first is None or last is None or last[0] != rounds:
        raise RunError(f"{folder.path} is not finished; `fedllm resume {folder.path}` goes on with it")
    clients = [ClientInfo(c["id"], c["n"], Profile(rank=c["rank"])) for c in folder.read("clients.json")]
    start, state, states = first[1]["state"], first[1]["state"], first[1]["layers"]
    asked = {e["round"]: e["cohort"] for e in folder.events() if e["kind"] == "round"}  # as the selector chose
    engine = Playback(folder.path / "replies", REDUCERS[reducer] if reducer else None, recipe.clients.quorum)
    for round in range(rounds):
        engine.begin(round)
        cohort = in_order(clients, asked[round]) if round in asked else draw_cohort(
            clients, recipe.clients.per_round, recipe.seed, round)
        try:
            state = drive(method.round(state, cohort), engine, layers, states[: len(layers)])
        except QuorumError as error:
            log.warning("round %d is skipped: %s", round, error)
    out = folder.path / f"replay-{reducer or 'same'}"
    _write(out, recipe, folder, method, state)
    theta, goal, begun = (method.served(s)[0] for s in (state, last[1]["state"], start))
    return Replayed(out, reducer or "same", rounds, digest(state), digest(state) == digest(last[1]["state"]),
                    _relative(theta, goal, begun))


def _relative(theta: Tree, goal: Tree, begun: Tree) -> float:
    if theta.keys() != goal.keys() or any(theta[n].shape != goal[n].shape for n in goal):
        return float("nan")
    moved = norm(sub(goal, begun)) if all(n in begun and begun[n].shape == goal[n].shape for n in goal) else norm(goal)
    return norm(sub(theta, goal)) / max(moved, torch.finfo(torch.float32).tiny)


def _write(out: Path, recipe: Any, folder: RunFolder, method: Any, state: Any) -> None:
    space, _ = make_recipe_space(recipe)
    model = recipe_model(recipe, space, recipe.data.task, recipe.data.labels or (), "auto")
    out.mkdir(exist_ok=True)
    write_served(RunFolder(out), model, method, state)

"""What is left of a client in the model that was made without it: membership inference and canaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm.audits import membership
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data import canaries as birds
from fedllm.runs.folder import RunFolder
from fedllm.runs.without import FILE, Removed

MOST, CANDIDATES = 1000, 1000
"""Rows of the client that are looked at, and random rows that its canaries are ranked among."""


def left(removed: Removed) -> dict[str, Any]:
    """Of the client's rows, under the model that learned from it (`with`), the one that never did (`without`) and the
    one that all began with (`start`): `loss`, `auc` against rows that nobody learned (its own test rows and the global
    test), and `exposure` of its planted canaries. What could not be tested says why under `left_out`.

    Adds them to `removed.json`. A model without the client is at the start's level of nothing but chance: rows of one
    client may be easier than others' for any model, so the figure to hold `without` to is that of `start`.
    """
    parts, world = removed.parts, removed.parts.world
    said: dict[str, Any] = {}
    if world.model is None or parts.recipe.data.task not in ("generation", "classification"):
        said = {"left_out": f"data.task = {parts.recipe.data.task!r}: an audit tests generation and classification"}
    elif not parts.method.serves:
        said = {"left_out": f"method '{parts.recipe.method.name}' serves no model that outsiders could ask"}
    else:
        models = {"with": removed.before, "without": removed.after, "start": (world.model.initial(), None)}
        said = {name: _tested(removed, *model) for name, model in models.items()}
    folder = RunFolder(removed.folder)
    folder.write_json(FILE, {**folder.read(FILE), "tests": said})
    return said


def _tested(removed: Removed, theta: Tree, base: Tree | None) -> Mapping[str, float]:
    """One model's figures."""
    parts, world = removed.parts, removed.parts.world
    federation, spec = world.federation, parts.recipe.data
    planted, fresh = [], []
    if spec.canaries:
        planted = [c.row for c in birds.canaries(list(federation.clients), spec.canaries, parts.recipe.seed,
                                                 world.model.tokenizer, federation.labels)
                   if c.planted and c.client == removed.client]
        fresh = birds.random_rows(numpy_stream(parts.recipe.seed, "canary candidates"), CANDIDATES,
                                  birds.usual_words(world.model.tokenizer), federation.labels)
    birds_of = {str(row) for row in planted}
    mine = [r for r in federation.clients[removed.client].train if str(r) not in birds_of][:MOST]
    known = {str(r) for r in federation.pooled()}
    others = [r for r in [*federation.clients[removed.client].test, *federation.test] if str(r) not in known]

    def loss(rows: Any) -> np.ndarray:
        return -membership.row_scores(world.model, theta, base, world.tokenized(rows), world.limits)["loss"]

    lost = loss(mine)
    said = {"loss": float(lost.mean())}
    if others:
        said["auc"] = membership.auc(-lost, -loss(others))
    if planted:
        said["exposure"] = float(birds.exposures(loss(planted), loss(fresh)).mean())
    return said

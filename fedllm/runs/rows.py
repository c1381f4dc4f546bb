"""Reads every row as the run's models will, before any work: what cannot be read is refused, what is cut is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from fedllm.core.client import SERVER
from fedllm.data.federation import Row
from fedllm.data.load import load_federation
from fedllm.engines.world import World
from fedllm.models.model import Model
from fedllm.runs.build import Parts
from fedllm.runs.fits import overrides
from fedllm.runs.recipe import Recipe
from fedllm.tasks.row import IGNORE

FEW, LAST = 50, 4
"""Rows of which the ends are looked at, and their last tokens (a line break may follow an end token)."""
MOST = 50_000
"""Rows that are looked at; those of further clients are read when they are asked for."""


def file_rows(recipe: Recipe, file: float | str) -> Sequence[Row]:
    """The rows of a file of one's own, shaped as the recipe says; of rows that lie elsewhere no fraction can be held
    out."""
    if not isinstance(file, str):
        return ()
    spec = recipe.data
    own = spec.model_copy(update={"source": file, "test": 0.0, "public": 0.0, "client_test": 0.0, "office": None,
                                  "partition": {"kind": "per_file"}, "limit": None})
    return load_federation(own, recipe.seed).pooled()


def look(parts: Parts) -> list[str]:
    """What is cut, a sentence each; a DataError names the file and row of what the model cannot read."""
    federation = parts.world.federation
    if federation.streamed or federation.acts or overrides(parts.method, "answer") or parts.engine is not None:
        return []  # rows are read when they are asked for, are no text or no rows to learn from, or lie at sites
    return [*_cut(parts.world), *(_template(parts.world) if parts.recipe.data.template == "chat" else ())]


def _template(world: World) -> Iterator[str]:
    """What of the model's chat template a user should know: that answers learn no end, or that it tells the day."""
    model, first = world.model, next(iter(world.federation.clients), None)
    if not isinstance(model, Model) or model.tokenizer is None or first is None:
        return
    rows = [row.labels[row.labels != IGNORE] for row in world.encoded(first, "train", model)[:FEW]
            if not row.cut and isinstance(row.labels, np.ndarray)]
    if rows and not any(model.ends & set(said[-LAST:].tolist()) for said in rows):
        yield ("the model's chat template writes no end token after an answer, so that none is learned, and the model "
               "goes on after what it had to say")
    if "strftime_now" in str(model.tokenizer.chat_template):
        yield ("the model's chat template may tell the date (strftime_now): a run on another day then trains on other "
               "texts, and is not the same")


def _cut(world: World) -> Iterator[str]:
    cut: dict[str, Counter[str]] = {"training": Counter(), "test": Counter()}
    looked = 0
    for client in (SERVER, *world.federation.clients):
        model = world.model_of(client)
        if not isinstance(model, Model) or model.tokenizer is None or model.rules.net == "dual":
            continue
        for part, name in (("train", "training"), ("test", "test")):
            if (client == SERVER and part == "train") or looked > MOST or not world.rows(client, part):
                continue
            rows = world.encoded(client, part, model)
            looked += len(rows)
            cut[name].update(row.cut for row in rows if row.cut)
            cut[name]["rows"] += len(rows)
    room = world.model.room
    long = f"local.max_length = {world.local.max_length}"
    if room < world.local.max_length:
        long = f"the model's {room} positions ({long} is more)"
    for name, found in cut.items():
        said = [f"{found[what]} lose {lost}" for what, lost in (
            ("answer", "the end of the answer (so that none learns to end there)" if name == "training" else
             "the end of the wanted answer, for the loss alone"),
            ("prompt", "the start of the prompt"), ("text", "the end of the text")) if found[what]]
        if said:
            yield f"{' and '.join(said)}, of {found['rows']:,} {name} rows: they are longer than {long}"

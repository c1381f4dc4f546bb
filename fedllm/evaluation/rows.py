"""Rows of one's own: every figure before and after a run on the very same rows, and how sure their difference is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.client import SERVER
from fedllm.core.errors import DataError, RecipeError
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row
from fedllm.data.load import load_federation
from fedllm.engines.world import World
from fedllm.evaluation.trained import Arm, Trained, log
from fedllm.local.spec import LocalSpec
from fedllm.runs.rows import file_rows
from fedllm.runs.sections import OWN
from fedllm.tasks.answers import judges_of, listed
from fedllm.tasks.chat import wanted
from fedllm.tasks.choices import FIGURE, options, picked

DRAWS = 10_000
"""Resamples of the bootstrap."""
Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""Figure -> what is summed of each row, and what it is divided by: both [rows]."""


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the paired 95 % bootstrap interval of their difference (rows drawn anew)."""

    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluated:
    """What rows of one's own told."""

    data: str
    sha256: str
    """Of the file; empty for the recipe's own test rows."""
    n: int
    metrics: Mapping[str, Change]
    rows: Sequence[Mapping[str, Any]]
    """Of each row the answers and figures, before and after."""

    def as_json(self) -> dict[str, Any]:
        """What `evaluations/NAME.json` holds."""
        return {"kind": "rows", **asdict(self)}


def evaluate_rows(run: Trained, data: str | None = None, metric: str | Sequence[str] | None = None,
                  limit: int | None = None, max_new_tokens: int | None = None) -> Evaluated:
    """The run's model and the one that it began with on the rows of `data` (None: the recipe's global test).

    `limit` draws so many rows at random by the recipe's seed. DataError for rows that cannot be read, RecipeError
    for a metric that does not suit the task.
    """
    recipe, model = run.recipe, run.before.model
    if metric is not None and not model.rules.speaks:
        raise RecipeError(f"--metric {metric!r}: the run's task is {recipe.data.task}, where nothing is generated; "
                          "leave it out")
    own = recipe.data.test if recipe.data.source == OWN else None  # the coordinator's file, where sites hold the rest
    file = data or own
    rows = list(file_rows(recipe, file) if file else load_federation(recipe.data, recipe.seed).test)
    if not rows:
        raise DataError("there is nothing to test on: the recipe has no global test; give --data FILE")
    if limit is not None and limit < len(rows):
        few = numpy_stream(recipe.seed, "evaluate.limit").choice(len(rows), limit, replace=False)
        rows = [rows[i] for i in sorted(few.tolist())]
    new = max_new_tokens or recipe.evaluate.max_new_tokens
    told = listed(metric if metric is not None else recipe.evaluate.metric)
    answers: list[list[str]] = []
    sums = []
    for name, arm in (("before", run.before), ("after", run.after)):
        log.info("evaluating the model %s the run on %d rows", name, len(rows))
        one, said = _figures(run, arm, rows, told, new)
        sums.append(one)
        answers.append(said)
    seed = numpy_stream(recipe.seed, "evaluate.bootstrap")
    drawn = seed.integers(len(rows), size=(DRAWS, len(rows)), dtype=np.int32) if len(rows) <= 2000 else None
    metrics = {n: change(sums[0][n], sums[1][n], drawn, seed) for n in sums[0]}
    sha = hashlib.sha256(Path(data).read_bytes()).hexdigest() if data and Path(data).is_file() else ""
    return Evaluated(data or "the recipe's global test", sha, len(rows), metrics, _told(rows, answers, sums))


def _figures(run: Trained, arm: Arm, rows: Sequence[Row], told: Sequence[str], new: int
             ) -> tuple[Sums, list[str]]:
    """What is summed of each row for every figure, and the answers."""
    world = World(arm.model, Federation({}, rows, run.recipe.data.task, arm.model.labels),
                  LocalSpec.make(run.recipe.local, "local"))
    encoded = world.encoded(SERVER, "test")
    got, one = arm.losses(encoded), np.ones(len(rows))
    sums: Sums = {"loss": (got.total, got.count)}
    if not arm.model.rules.speaks:
        if "accuracy" in arm.model.rules.metrics:
            sums["accuracy"] = (got.figures[:, 2], got.figures[:, 1])
        return sums, []
    said = arm.say([e.prompt for e in encoded], new)
    wants = [wanted(row, arm.model.tokenizer) for row in rows]
    for name, right in judges_of(told).items():
        sums[name] = np.array([right(s, want) for s, want in zip(said, wants, strict=True)]), one
    if made := options(rows) if "choice" in told else []:
        each = arm.losses(world.tokenized([row for many, _ in made for row in many], True))
        sums[FIGURE] = np.array(picked(each.total, made)), one
    return sums, said


def change(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], drawn: np.ndarray | None,
           seed: np.random.Generator) -> Change:
    """Both figures and their difference, with its interval over rows drawn with replacement, the same for both."""
    (a, na), (b, nb) = before, after
    differences = np.empty(DRAWS)
    for k in range(DRAWS):
        at = seed.integers(len(a), size=len(a)) if drawn is None else drawn[k]
        differences[k] = b[at].sum() / max(nb[at].sum(), 1e-12) - a[at].sum() / max(na[at].sum(), 1e-12)
    low, high = np.quantile(differences, (0.025, 0.975))
    was, now = float(a.sum() / na.sum()), float(b.sum() / nb.sum())
    return Change(was, now, now - was, float(low), float(high))


def _told(rows: Sequence[Row], answers: Sequence[Sequence[str]], sums: Sequence[Sums]) -> list[dict[str, Any]]:
    out = []
    for i, row in enumerate(rows):
        figures = {n: [float(s[n][0][i] / max(s[n][1][i], 1e-12)) for s in sums] for n in sums[0]}
        said = {"expected": row["response"], "before": answers[0][i], "after": answers[1][i]} if answers[0] else {}
        out.append({"prompt": str(row.get("prompt") or row.get("text") or ""), **said, "figures": figures})
    return out

"""Runs the leaderboard: tries each method's points, measures the best on seeds apart, and keeps what came of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.bench.rows import machine
from evidence.leaderboard.cells import make_cell, place, run_cell
from evidence.leaderboard.code import code_of
from evidence.leaderboard.figures import measured, said_of
from evidence.leaderboard.fit import ANSWERS, TRIES, Edits, family, forms, points, trains
from evidence.leaderboard.worlds import FIRST, World
from evidence.verdict import TUNED
from fedllm.comparisons.axes import words
from fedllm.comparisons.design import Cell
from fedllm.comparisons.pool import Pool, pool
from fedllm.comparisons.weighed import worth
from fedllm.core.errors import RunError
from fedllm.core.knobs import hint_of
from fedllm.methods.registry import METHODS
from fedllm.runs.folder import RunFolder
from fedllm.runs.result import Result
from fedllm.runs.store import reading

SEEDS = (4000, 4001, 4002)
"""Measured; points are tried on the seeds that nothing is measured on."""
REFUSALS = ("RecipeError", "CompositionError", "ModelError", "DataError", "PayloadError")
Row = dict[str, Any]
Tell = Callable[[str], None]


class Stopped(Exception):
    """The budget is spent."""


class Board:
    """One call of the leaderboard: which rows, where cells lie, and the file that rows are kept in."""

    def __init__(self, file: Path, room: Path, worlds: Mapping[str, World], *, seeds: Sequence[int] = SEEDS,
                 tries: int = TRIES, budget: float | None = None, tell: Tell = lambda text: None) -> None:
        self.file, self.room, self.worlds, self.seeds, self.tries = file, room, worlds, seeds, tries
        self.ends = math.inf if budget is None else time.monotonic() + budget
        self.tell = tell
        self.wrong: dict[str, dict[str, Any]] = {}
        self.rows = read_rows(file)

    def go(self, methods: Sequence[str] | None = None, ready: Callable[[], None] = lambda: None) -> list[Row]:
        """Measure what is missing, then what was measured with other code; `ready` is called after each row."""
        self.room.mkdir(parents=True, exist_ok=True)
        jobs = sorted(self.jobs(methods), key=lambda job: job in self.rows)  # stable: else as they are listed
        with RunFolder(self.room).held(), pool(1, self.room) as workers:
            for at, (world, method) in enumerate(jobs):
                if self.done(world, method, retry=methods is not None):
                    continue
                self.tell(f"{at + 1} of {len(jobs)}: {method} on {world}")
                try:
                    row = self.row(workers, world, method)
                except Stopped:
                    break
                self.rows[world, method] = row
                self.write()
                ready()
                self.tell(f"{method} on {world}: {row['status']}{': ' + row['why'] if row['why'] else ''}")
        return [self.rows[job] for job in jobs if job in self.rows]

    def jobs(self, methods: Sequence[str] | None) -> list[tuple[str, str]]:
        """Every row that is asked for, world by world, baselines first."""
        names = list(METHODS) if methods is None else list(methods)
        order = sorted(names, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))
        return [(world, method) for world in self.worlds for method in order]

    def done(self, world: str, method: str, retry: bool = False) -> bool:
        """Whether the row is there, whole, of this code and of these seeds; with `retry` one that failed is not."""
        row = self.rows.get((world, method))
        return row is not None and row["code"] == code_of(method) and row["status"] != "part" and (
            row["status"] in ("refused", *(() if retry else ("failed",))) or row["seeds"] == list(self.seeds))

    def row(self, workers: Pool, world: str, method: str) -> Row:
        """Everything about one method on one world; Stopped where nothing of it could be begun."""
        row: Row = {"world": world, "method": method, "family": family(method), "status": "refused", "why": "",
                    "code": code_of(method), **said_of(method)}
        if not trains(method):
            return {**row, "why": ANSWERS}
        form, why = self.fitting(workers, world, method)
        if form is None:
            return {**row, "why": why}
        row["form"] = {k: v for k, v in form.items() if k != "space"} | {"space": form["space"]}
        tried = {words(p): self.tried(workers, world, form, p) for p in points(method, self.worlds[world], form)[
            : self.tries]}
        row["tried"] = {name: told for name, (told, _) in tried.items()}
        losses = [math.inf if isinstance(told, str) else told for told, _ in tried.values()]
        if min(losses) == math.inf:
            return {**row, "status": "failed", "why": next(t for t, _ in tried.values() if isinstance(t, str))}
        row["rates"] = list(tried.values())[losses.index(min(losses))][1]
        return {**row, **self.seen(workers, world, form, row["rates"])}

    def fitting(self, workers: Pool, world: str, method: str) -> tuple[Edits | None, str]:
        """The first form that the library builds, or what it said of the plainest."""
        refused = []
        for form in forms(method, self.worlds[world]):
            point = points(method, self.worlds[world], form)[self.tries // 2]  # whose run is wanted in any case
            _, got = self.run(workers, world, form, point, TUNED[0])
            if got.get("kind") not in REFUSALS:
                return form, ""
            refused.append(got["error"])
        return None, refused[0]

    def tried(self, workers: Pool, world: str, form: Edits, point: Mapping[str, Any]) -> tuple[float | str, Any]:
        """A point's loss on the clients' own test rows, or why there is none; and the point."""
        folder, got = self.run(workers, world, form, point, TUNED[0])
        if "error" in got:
            return got["error"], point
        loss = worth([Result.load(folder)])
        return (round(loss, 5), point) if math.isfinite(loss) else ("its loss is no number", point)

    def seen(self, workers: Pool, world: str, form: Edits, point: Mapping[str, Any]) -> Row:
        """The figures of the measured seeds; a cell that fails is told, and the rest counts."""
        folders, failed, cells = {}, {}, {}
        status = "measured"
        for seed in self.seeds:
            try:
                folder, got = self.run(workers, world, form, point, seed)
            except Stopped:
                status = "part"
                break
            cells[str(seed)] = folder.name
            if "error" in got:
                failed[str(seed)] = got["error"]
            else:
                folders[seed] = folder
        if not folders:
            if status == "part":
                raise Stopped
            return {"status": "failed", "why": next(iter(failed.values())), "failed": failed, "cells": cells}
        return {"status": status, **measured(folders), "failed": failed, "cells": cells}

    def run(self, workers: Pool, world: str, form: Edits, point: Mapping[str, Any], seed: int
            ) -> tuple[Path, dict[str, Any]]:
        """One cell's folder, and what came of it."""
        cell: Cell = make_cell(world, self.worlds[world], self.room, form, point, seed)
        at = place(self.room, world)
        if time.monotonic() > self.ends and not (at / cell.name / "result.json").is_file():
            raise Stopped
        got = self.wrong.get(cell.name) or run_cell(workers, cell, at)
        if "error" in got:
            self.wrong[cell.name] = got  # it would fail again
        return at / cell.name, got

    def write(self) -> None:
        """Whole or not at all: hours of work may be stopped at any time."""
        order = {job: i for i, job in enumerate(self.jobs(None))}
        rows = [self.rows[k] for k in sorted(self.rows, key=lambda k: (order.get(k, len(order)), k))]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        partial.replace(self.file)


def read_rows(file: Path) -> dict[tuple[str, str], Row]:
    """(world, method) -> row, of what was measured before."""
    if not file.is_file():
        return {}
    with reading(file):
        said = json.loads(file.read_text())
    if not isinstance(said, dict) or not isinstance(said.get("rows"), list):
        raise RunError(f"{file} holds no leaderboard: allowed is what `python -m evidence.leaderboard` wrote")
    return {(r["world"], r["method"]): r for r in said["rows"]}


def known(asked: Sequence[str], there: Sequence[str], option: str) -> Iterator[str]:
    """Why a name is none, each with the nearest."""
    return (f"{option} {n!r} is unknown{hint_of(n, list(there))} Allowed: {', '.join(there)}"
            for n in asked if n not in there)

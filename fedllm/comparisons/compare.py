"""Compares: checks every arm, chooses rates on seeds apart, runs what has not been run, and writes what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedllm.comparisons.axes import words
from fedllm.comparisons.design import Arm, Cell, Design, Setting, make_design, pairs
from fedllm.comparisons.figures import table_of
from fedllm.comparisons.match import not_as_asked, same_comparison
from fedllm.comparisons.page import as_markdown, report_html
from fedllm.comparisons.pool import Pool, pool
from fedllm.comparisons.told import Comparison
from fedllm.comparisons.weighed import cautions, version_of, worth
from fedllm.core.errors import RecipeError, RunError
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result
from fedllm.runs.store import private_folder, reading

FILE = "comparison.yaml"
"""What was asked for: recipe, arms, seeds, grid."""
ROOT = Path("comparisons")
Tell = Callable[[str, Mapping[str, Any]], None]
"""Hears of the way: what happened, and what is known of it."""


def compare(recipe: str | Path | Mapping[str, Any] | Recipe, *, methods: Sequence[str] = (),
            vary: Mapping[str, Sequence[Any]] | None = None, grid: Mapping[str, Sequence[Any]] | None = None,
            seeds: int | Sequence[int] | None = None, baseline: str | None = None, tuning_seeds: int = 2,
            overrides: Mapping[str, Any] | None = None, real: bool = False, jobs: int = 1,
            out: str | Path | None = None, tell: Tell = lambda what, facts: None) -> Comparison:
    """Run a recipe under several methods and settings over seeds, or a recipe family, and compare.

    Every cell is a run's folder under `out` (comparisons/NAME); what is finished there is not run again. Raises
    RecipeError, DataError, ModelError or CompositionError before anything is trained, RunError for a folder that holds
    something else. A cell that fails costs its figure alone (`Comparison.failed`).
    """
    design = make_design(recipe, methods=methods, vary=vary, grid=grid, seeds=seeds, baseline=baseline,
                         tuning_seeds=tuning_seeds, overrides=overrides, real=real)
    return Work(design, Path(out) if out else ROOT / design.name, jobs, tell).go()


class Work:
    """One comparison under way."""

    def __init__(self, design: Design, folder: Path, jobs: int, tell: Tell) -> None:
        self.design, self.folder, self.jobs, self.tell = design, folder, jobs, tell
        if jobs < 1:
            raise RecipeError(f"--jobs {jobs}: allowed is a number from 1 up")
        self.first = {(s.name, a.label): design.cell(s, a, design.seeds[0], p[0])
                      for s, a in pairs(design) for p in [design.points(s, a)] if self._every(s, a, p)}
        self.rates: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.tried: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def _every(self, setting: Setting, arm: Arm, points: Sequence[Mapping[str, Any]]) -> bool:
        """Make every recipe of an arm, so that a value that no key takes is refused now."""
        for point in points:
            light(self.design.recipe(setting, arm, self.design.seeds[0], point, "arm"))
        return True

    def go(self) -> Comparison:
        """From wherever the folder stands to the end."""
        known = self._open()
        room = RunFolder(self.folder)
        with room.held(), pool(self.jobs, self.folder) as workers:
            trained = self._check(workers, known)
            room.write_text(FILE, yaml.safe_dump(self._asked(known, trained), sort_keys=False))
            self._tune(workers)
            cells = [self.design.cell(s, a, seed, self.rates[s.name, a.label])
                     for seed in self.design.seeds for s, a in pairs(self.design)]  # seed by seed: all arms grow alike
            self._run(workers, cells, self.folder)
            found = self._told(cells, trained)
            room.write_json("comparison.json", found.as_json())
            room.write_text("comparison.md", as_markdown(found))
            room.write_text("report.html", report_html(found, self.folder))
        return found

    def _open(self) -> dict[str, Any]:
        """What the folder's comparison was asked; an empty mapping for a fresh folder. RunError for any other."""
        path = self.folder / FILE
        if path.is_file():
            with reading(path):
                known = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
                same_comparison(known, self._asked({}, {}), self.folder)
            for cell in self.first.values():  # the others differ in their seed alone
                at = self.folder / cell.name
                if not self.design.grid and (at / "recipe.yaml").is_file() and (why := not_as_asked(cell.recipe, at)):
                    raise RunError(why)
            return known
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunError(f"{self.folder} is there and holds no comparison (it has no {FILE}); give --out another "
                           "folder")
        try:
            private_folder(self.folder)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be made: {error.strerror or error}") from None
        return {}

    def _asked(self, known: Mapping[str, Any], trained: Mapping[tuple[str, str], int]) -> dict[str, Any]:
        """What is asked, with what was asked of this folder before."""
        d, old = self.design, known.get("settings", {})
        settings = {s.name: {"set": dict(s.edits), "arms": {
            **old.get(s.name, {}).get("arms", {}), **{a.label: dict(a.edits) for a in s.arms}}, "trained": {
            **old.get(s.name, {}).get("trained", {}),
            **{a.label: trained[s.name, a.label] for a in s.arms if (s.name, a.label) in trained}}} for s in d.settings}
        return {"recipe": dict(d.base), "overrides": dict(d.overrides), "grid": {k: list(v) for k, v in d.grid.items()},
                "tuning": list(d.tuning), "settings": {**old, **settings},
                "seeds": sorted({*known.get("seeds", ()), *d.seeds})}

    def _check(self, workers: Pool, known: Mapping[str, Any]) -> dict[tuple[str, str], int]:
        """Build each arm that no earlier call has built; the first that does not fit ends the comparison."""
        settings = known.get("settings", {})
        done = {key: n for key in self.first
                if (n := settings.get(key[0], {}).get("trained", {}).get(key[1])) is not None}
        todo = {cell.name: key for key, cell in self.first.items() if key not in done}
        wrong: list[str] = []

        def told(cell: Cell, got: Mapping[str, Any]) -> None:
            self.tell("checked", {"arm": cell.arm, "setting": cell.setting, **got})
            if "error" in got:
                wrong.append(f"{' '.join(filter(None, (cell.setting, cell.arm)))}: {got['error']}")

        self.tell("checking", {"cells": len(todo)})
        answers = workers.each("check", [self.first[k] for k in todo.values()], self.folder, told)
        if wrong:
            self._leave_no_trace(known)
            raise RecipeError("\n".join(wrong))
        return {**done, **{todo[name]: got["trained"] for name, got in answers.items()}}

    def _leave_no_trace(self, known: Mapping[str, Any]) -> None:
        """A folder that was made for nothing goes."""
        if not known:
            import shutil

            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, workers: Pool, cells: Sequence[Cell], place: Path) -> None:
        """Run the cells that are not finished; what fails is noted."""
        todo = [c for c in cells if not (place / c.name / "result.json").is_file()]
        self.tell("cells", {"cells": len(cells), "done": len(cells) - len(todo)})

        def told(cell: Cell, got: Mapping[str, Any]) -> None:
            if "error" in got:
                self.failed[cell.name] = got["error"]
            self.tell("cell", {"folder": str(place / cell.name), "arm": cell.arm, "setting": cell.setting,
                               "seed": cell.seed, "rates": dict(cell.rates), **got})

        workers.each("cell", todo, place, told)

    def _tune(self, workers: Pool) -> None:
        """Run what the grid asks for, and choose each arm's rates."""
        points = {(s.name, a.label): self.design.points(s, a) for s, a in pairs(self.design)}
        trials = {(s.name, a.label): [[self.design.trial(s, a, seed, point) for seed in self.design.tuning]
                                      for point in points[s.name, a.label]]
                  for s, a in pairs(self.design) if len(points[s.name, a.label]) > 1}
        place = self.folder / "tuning"
        if trials:
            place.mkdir(exist_ok=True)
            self._run(workers, [c for of in trials.values() for cells in of for c in cells], place)
        for key, found in points.items():
            worths = [math.inf if any(c.name in self.failed for c in cells) else worth(
                [Result.load(place / c.name) for c in cells]) for cells in trials.get(key, [])] or [0.0]
            arm = " ".join(filter(None, key))
            if min(worths) == math.inf:
                raise RunError(f"{arm}: no point of the grid ended with a figure; {place} has the runs, and "
                               f"{self.folder / 'logs'} what they said")
            self.rates[key] = found[worths.index(min(worths))]
            if key in trials:
                finite = (w if math.isfinite(w) else None for w in worths)
                self.tried[arm] = {words(p): w for p, w in zip(found, finite, strict=True)}
        self.failed.clear()  # a rate that diverges is an answer

    def _told(self, cells: Sequence[Cell], trained: Mapping[tuple[str, str], int]) -> Comparison:
        results: dict[tuple[str, str], dict[int, Result]] = {key: {} for key in self.first}
        for cell in cells:
            if cell.name not in self.failed and (self.folder / cell.name / "result.json").is_file():
                result = Result.load(self.folder / cell.name)
                if result.failed:
                    self.failed[cell.name] = f"the run did nothing: {result.failed}"
                else:
                    results[cell.setting, cell.arm][cell.seed] = result
        tables = []
        for s in self.design.settings:
            arms = {}
            for a in s.arms:
                mine = {c.seed: c.name for c in cells if (c.setting, c.arm) == (s.name, a.label)}
                arms[a.label] = {"method": a.method, "rates": self.rates[s.name, a.label], "cells": mine,
                                 "trained": trained[s.name, a.label],
                                 "failed": {seed: self.failed[n] for seed, n in mine.items() if n in self.failed}}
            tables.append(table_of(s.name, s.about, s.baseline, arms,
                                   {a.label: results[s.name, a.label] for a in s.arms}))
        d = self.design
        versions = sorted({version_of(self.folder / c.name) for c in cells} - {""})
        said = cautions(d, {key: cell.recipe for key, cell in self.first.items()}, self.rates, versions, self.jobs)
        return Comparison(self.folder, d.name, d.card, d.seeds, d.grid, d.tuning, self.tried, tables, said, versions)


def light(recipe: Recipe) -> None:
    """Refuse knobs that the recipe's method, space or training does not take, without loading anything."""
    from fedllm.local.spec import LocalSpec
    from fedllm.methods.registry import make_method
    from fedllm.runs.build import by_key, make_recipe_space

    by_key("method", lambda: make_method(recipe.method.name, **recipe.method.knobs))
    make_recipe_space(recipe)
    by_key("local", lambda: LocalSpec.make(recipe.local, "local"))

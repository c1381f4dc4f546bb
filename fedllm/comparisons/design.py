"""What is compared with what: the arms of each table, the seeds, and the recipe of every cell."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.comparisons.axes import named, slug, words
from fedllm.comparisons.family import Family, FamilySetting, read_family
from fedllm.core.errors import RecipeError
from fedllm.core.knobs import hint_of
from fedllm.methods.registry import METHODS, method_class
from fedllm.runs.recipe import Recipe, load_recipe, read_recipe

ALONE = ("local_only", "centralized")
"""Methods without a federation: they run without the recipe's layers, as baselines of a run do."""
SEEDS = 8
"""Measured where nobody says how many: with fewer than 6 no difference can be told from chance."""
TUNING = 1000
"""Rates are chosen on the seeds from here on, which are never among the measured ones."""


@dataclass(frozen=True)
class Arm:
    """One row of a table: the recipe with these keys changed."""

    label: str
    method: str
    edits: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One table: its arms are compared among themselves."""

    name: str
    edits: Mapping[str, Any]
    arms: Sequence[Arm]
    baseline: str
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """One run: an arm of a table at one seed, under some rates."""

    setting: str
    arm: str
    seed: int
    rates: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe.name


@dataclass(frozen=True)
class Design:
    """A whole comparison, before anything has run."""

    base: Mapping[str, Any]
    settings: Sequence[Setting]
    seeds: Sequence[int]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuning: Sequence[int] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    """Of a family: title, paper, shows, about."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return str(self.base["name"])

    def recipe(self, setting: Setting, arm: Arm, seed: int, rates: Mapping[str, Any], name: str) -> Recipe:
        """The recipe of one cell: the base, then the setting's keys, the user's, the arm's, the rates."""
        alone: dict[str, Any] = {"layers": []} if arm.method in ALONE else {}
        edits = {**setting.edits, **self.overrides}
        raw = read_recipe(self.base, edits).model_dump()
        return read_recipe(raw, {**alone, **arm.edits, **rates, "evaluate.baselines": [], "seed": seed, "name": name})

    def cell(self, setting: Setting, arm: Arm, seed: int, rates: Mapping[str, Any]) -> Cell:
        """The measured run of an arm at a seed."""
        name = f"{self.place(setting, arm)}-seed{seed}"
        return Cell(setting.name, arm.label, seed, rates, self.recipe(setting, arm, seed, rates, name))

    def trial(self, setting: Setting, arm: Arm, seed: int, rates: Mapping[str, Any]) -> Cell:
        """A run that helps to choose the arm's rates."""
        name = f"{self.place(setting, arm)}-{slug(words(rates))}-seed{seed}"
        return Cell(setting.name, arm.label, seed, rates, self.recipe(setting, arm, seed, rates, name))

    def place(self, setting: Setting, arm: Arm) -> str:
        """What the folders of an arm's runs begin with."""
        return slug(f"{setting.name}-{arm.label}" if setting.name else arm.label)

    def points(self, setting: Setting, arm: Arm) -> list[dict[str, Any]]:
        """The points of the grid for an arm; of `method.` and `space.` keys it has those that are its own knobs."""
        recipe = self.recipe(setting, arm, self.seeds[0], {}, "arm")
        axes = {k: v for k, v in self.grid.items() if has_key(recipe, k)}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def has_key(recipe: Recipe, key: str) -> bool:
    """Whether this recipe's method or space has the knob; keys of other sections every recipe has."""
    from fedllm.spaces.registry import SPACES

    section, _, knob = key.partition(".")
    if section == "method":
        return knob in method_class(recipe.method.name).knobs()
    return section != "space" or knob in SPACES.find(recipe.space.name, "space.name").knobs()


def make_design(source: str | Path | Mapping[str, Any] | Recipe, *, methods: Sequence[str] = (),
                vary: Mapping[str, Sequence[Any]] | None = None, grid: Mapping[str, Sequence[Any]] | None = None,
                seeds: int | Sequence[int] | None = None, baseline: str | None = None, tuning_seeds: int = 2,
                overrides: Mapping[str, Any] | None = None, real: bool = False) -> Design:
    """The design that a recipe or a family and these wishes make; RecipeError for what cannot be compared."""
    family = read_family(Path(source)) if isinstance(source, str | Path) else None
    changes = dict(overrides or {})
    if family is None:
        if real:
            raise RecipeError("--real: only a recipe family says what its real run is, and this is a recipe")
        base = load_recipe(source, changes)
        arms = _arms(list(methods) or [base.method.name], _varied(vary or {}), "--methods")
        table = Setting("", {}, arms, _baseline(baseline, arms, ""))
        return _checked(Design(base.model_dump(), [table], _seeds(seeds, base.seed), dict(grid or {}),
                               _tuning(grid or {}, tuning_seeds)))
    if methods or vary:
        raise RecipeError(f"--methods and --vary: {family.title} is a family and says itself what varies; leave them "
                          "out, or give a recipe")
    return _of_family(family, changes, grid, seeds, baseline, tuning_seeds, real)


def _of_family(family: Family, changes: dict[str, Any], grid: Mapping[str, Sequence[Any]] | None,
               seeds: int | Sequence[int] | None, baseline: str | None, tuning_seeds: int, real: bool) -> Design:
    first = {"plugins": changes.pop("plugins")} if "plugins" in changes else {}
    base = load_recipe(family.base, {**first, **(family.real if real else {})})
    if real and not family.real:
        raise RecipeError(f"--real: {family.title} names no real run; its keys would stand under real")
    tables = [_table(name, s, base.method.name, baseline) for name, s in family.tables.items()]
    card = {"title": family.title, "paper": family.paper, "shows": family.shows, "about": family.about}
    chosen = dict(family.grid if grid is None else grid)
    asked = read_recipe(base, changes)
    raw = base.model_dump() | {"name": asked.name + ("-real" if real else "")}
    return _checked(Design(raw, tables, _seeds(family.seeds if seeds is None else seeds, asked.seed), chosen,
                           _tuning(chosen, tuning_seeds), changes, card))


def _table(name: str, s: FamilySetting, method: str, baseline: str | None) -> Setting:
    arms = _arms(s.methods or [method], s.arms, f"settings.{name}.methods" if name else "methods")
    return Setting(name, s.set, arms, _baseline(baseline or s.baseline, arms, name), s.about)


def _arms(methods: Sequence[str], varied: Mapping[str, Mapping[str, Any]], path: str) -> list[Arm]:
    """Each method with each change; a label says what is not the same for all."""
    for method in methods:
        METHODS.find(method, path)
    if twice := sorted({m for m in methods if list(methods).count(m) > 1}):
        raise RecipeError(f"{path} names {twice[0]!r} twice; each arm is run once for each seed")
    out = []
    for method, (label, edits) in itertools.product(methods, (varied or {"": {}}).items()):
        own = edits.get("method")
        name = method if own is None else own if isinstance(own, str) else str(own.get("name", method))
        both = {"method": {"name": method}, **edits} if own is None else dict(edits)
        said = [method] if len(methods) > 1 or not label else []
        out.append(Arm(" ".join([*said, *([label] if label else [])]), name, both))
    slugs = [slug(a.label) for a in out]
    if same := next((a.label for a in out if slugs.count(slug(a.label)) > 1), None):
        raise RecipeError(f"two arms would both be called {same!r}; give values that differ")
    return out


def _varied(vary: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Label -> edits, of every combination of the values."""
    axes = [[named(key, value) for value in values] for key, values in vary.items()]
    return {" ".join(label for label, _ in combo): dict(edit for _, edit in combo)
            for combo in itertools.product(*axes)} if axes else {}


def _baseline(wanted: str | None, arms: Sequence[Arm], setting: str) -> str:
    labels = [a.label for a in arms]
    if wanted is None:
        return labels[0]
    if wanted not in labels:
        where = f" (of {setting})" if setting else ""
        raise RecipeError(f"--baseline {wanted!r} is no arm{hint_of(wanted, labels, '')} Arms{where}: "
                          f"{', '.join(labels)}")
    return wanted


def _seeds(seeds: int | Sequence[int] | None, first: int) -> list[int]:
    """So many from the recipe's own on, or those that are listed; none of the seeds that rates are chosen on."""
    seeds = SEEDS if seeds is None else seeds
    found = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    if seeds == 0 or not found or any(s < 0 for s in found):
        raise RecipeError(f"--seeds {seeds}: allowed is a number of seeds from 1 up, or a list of seeds")
    if len(set(found)) < len(found):
        raise RecipeError(f"--seeds {seeds}: a seed is listed twice")
    return found


def _tuning(grid: Mapping[str, Sequence[Any]], count: int) -> list[int]:
    if not grid:
        return []
    if count < 1:
        raise RecipeError(f"--tuning-seeds {count}: allowed is a number from 1 up")
    return list(range(TUNING, TUNING + count))


def _checked(design: Design) -> Design:
    """The design, if measured seeds and tuning seeds lie apart and every grid key is somebody's."""
    if both := sorted(set(design.seeds) & set(design.tuning)):
        raise RecipeError(f"--seeds: {both[0]} is one of the seeds that rates are chosen on ({design.tuning[0]} to "
                          f"{design.tuning[-1]}); take other seeds to measure on")
    for key in design.grid:
        if not any(has_key(design.recipe(s, a, design.seeds[0], {}, "arm"), key) for s, a in pairs(design)):
            methods = ", ".join(sorted({a.method for _, a in pairs(design)}))
            raise RecipeError(f"--grid {key}: no arm has this knob (methods: {methods}); `fedllm methods ID` shows a "
                              "method's knobs")
    return design


def pairs(design: Design) -> Iterable[tuple[Setting, Arm]]:
    """Every arm with its setting."""
    return ((s, a) for s in design.settings for a in s.arms)

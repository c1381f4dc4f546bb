"""Measure what every method claims, and write the results where the docs read them: `python -m evidence.claims`."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import evidence.rigs
import fedllm.methods
from evidence.pages.verdicts import figure_text, write_table
from evidence.rigs.topics import cache_dir
from evidence.verdict import RELATIVE, fingerprint, judge, measured_on, same_work, tuned_on
from fedllm.audits.registry import audit_classes
from fedllm.core.card import Card, Claim
from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.methods.registry import METHODS, source_of
from fedllm.runs.layers import layer_classes
from fedllm.selectors.registry import selector_classes

DOCS = Path(__file__).parents[1] / "docs"
BEGAN = time.time()
Rig = Callable[..., Mapping[str, float]]


@functools.cache
def known_rigs() -> dict[str, Rig]:
    """Every rig by name: the `RIGS` of each module of evidence/rigs."""
    found: dict[str, Rig] = {}
    for info in pkgutil.iter_modules(evidence.rigs.__path__):
        found |= vars(importlib.import_module(f"evidence.rigs.{info.name}")).get("RIGS", {})
    return found


class Entry(NamedTuple):
    """One claim, whose it is, and where that stands."""

    card: Card
    claim: Claim
    source: Path
    chapter: str


def claimed() -> dict[str, Entry]:
    """Every claim by name: methods, layers with a card and audits by id, and further ones as `<id>:<word>`."""
    chapters = {name: module.split(".")[-2] for name, module in METHODS.ours.items()}
    found = {name: (kind.card, source_of(name), chapters.get(name) or METHODS.whose(name))
             for name, kind in METHODS.items()}
    for name, kind in layer_classes().items():
        if kind.card:
            found[name] = (kind.card, inspect.getsourcefile(kind) or "", f"layers: {kind.__module__.split('.')[1]}")
    for name, chooser in selector_classes().items():
        assert chooser.card is not None
        found[name] = (chooser.card, inspect.getsourcefile(chooser) or "", "selectors")
    for name, audit in audit_classes().items():
        room = audit.__module__.split(".")[1]
        found[name] = (vars(audit)["card"], inspect.getsourcefile(audit) or "", room)
    return {name + (f":{word}" if word else ""): Entry(card, claim, Path(source), chapter)
            for name, (card, source, chapter) in found.items()
            for word, claim in {"": card.claim, **card.also}.items()}


def measure(rig: str, method: str, seed: int, options: Mapping[str, Any], fresh: bool = False) -> dict[str, float]:
    """One run of a rig; a run that was made before is read from the cache, unless `fresh`.

    The cache sees changes to the method, to what methods share and to the rigs; after changes elsewhere run afresh.
    """
    run = known_rigs()[rig]
    what = (rig, method, seed, sorted(options.items(), key=repr), _code(rig, method))
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    path = cache_dir() / "claims" / f"{rig}-{method}-{seed}-{key}.json"
    if path.is_file() and not (fresh and path.stat().st_mtime < BEGAN):
        return json.loads(path.read_text())
    metrics = {k: float(v) for k, v in run(method, seed, **options).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))
    return metrics


@functools.cache
def _code(rig: str, method: str) -> str:
    """A digest of the files that a run's numbers depend on most: the method's, what methods share, and the rig's."""
    shared = Path(fedllm.methods.__file__ or "").parent.glob("_*.py")
    files = {claimed()[method].source, *shared, *_rig_files(Path(inspect.getsourcefile(known_rigs()[rig]) or ""))}
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()


def _rig_files(file: Path) -> set[Path]:
    """The rig's file, and those of other rigs that it imports from."""
    found, todo = set(), [file]
    while todo:
        found.add(at := todo.pop())
        named = {n.module.rpartition(".")[2] for n in ast.walk(ast.parse(at.read_text()))
                 if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("evidence.rigs.")}
        todo += [f for f in (at.parent / f"{name}.py" for name in named) if f not in found]
    return found


class Arm(NamedTuple):
    """One side of a claim: a method under the options that it runs with."""

    rig: str
    method: str
    options: Mapping[str, Any]

    def run(self, seed: int, fresh: bool = False) -> dict[str, float]:
        return measure(self.rig, self.method, seed, self.options, fresh)

    def at(self, rates: Mapping[str, float]) -> Arm:
        """The same arm with these options set; `local.lr` is `lr` in the option `local`."""
        options = dict(self.options)
        for path, value in rates.items():
            group, _, name = path.rpartition(".")
            options |= {group: {**options.get(group, {}), name: value}} if group else {name: value}
        return Arm(self.rig, self.method, options)


def arms_of(name: str, claim: Claim) -> dict[str, Arm]:
    """The method's arm, and the baseline's if there is one: `knobs` are the method's own, other options go to both."""
    mine = Arm(claim.rig, name.partition(":")[0], claim.options)
    shared = {k: v for k, v in claim.options.items() if k != "knobs"} | dict(claim.against)
    return {"method": mine, **({"baseline": Arm(claim.rig, claim.baseline, shared)} if claim.baseline else {})}


def tune(claim: Claim, arm: Arm, fresh: bool = False) -> dict[str, float]:
    """The point of the claim's grid at which this arm's mean metric is best, on seeds that are not measured.

    A knob that the arm's method does not have is no part of its grid; a run that fails or diverges is the worst.
    """
    has = METHODS[arm.method].knobs() if arm.method in METHODS else {}
    axes = {k: list(v) for k, v in claim.grid.items() if not k.startswith("knobs.") or k.partition(".")[2] in has}
    sign = 1.0 if (claim.better or {"<": "min", ">": "max"}[claim.holds[0]]) == "min" else -1.0

    def worth(point: Mapping[str, float]) -> float:
        try:
            got = float(np.mean([arm.at(point).run(seed, fresh)[claim.metric] for seed in tuned_on(claim)]))
        except FedLLMError:
            return math.inf
        return sign * got if math.isfinite(got) else math.inf

    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    worths = [worth(point) for point in points] if len(points) > 1 else [0.0]
    if min(worths) == math.inf:
        raise RecipeError(f"{arm.method} on {arm.rig}: no point of the grid {axes} gives a finite {claim.metric}")
    return points[worths.index(min(worths))]


def weigh(name: str, claim: Claim, fresh: bool = False, budget: float | None = None,
          step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Tune both arms, run both on every measured seed that the budget (seconds) allows, and judge the figures."""
    began, arms = time.perf_counter(), arms_of(name, claim)
    step(f"{name}, tuning" if claim.grid else name)
    rates = {side: tune(claim, arm, fresh) for side, arm in arms.items()} if claim.grid else {}
    arms = {side: arm.at(rates.get(side, {})) for side, arm in arms.items()}
    wanted, work = measured_on(claim), ""
    each: dict[str, list[float]] = {side: [] for side in arms}
    for seed in wanted:
        if each["method"] and budget is not None and time.perf_counter() - began > budget:
            break
        step(f"{name}, seed {seed}")
        got = {side: arm.run(seed, fresh) for side, arm in arms.items()}
        work = same_work(name, claim, got["method"], got["baseline"]) if claim.baseline else ""
        for side in arms:
            each[side].append(got[side][claim.metric])
    others = each.get("baseline", [0.0] * len(each["method"]))
    figures = [RELATIVE[claim.relative](m, o) for m, o in zip(each["method"], others, strict=True)]
    judged, seeds = judge(claim, figures), wanted[: len(figures)]
    return {"method": name, "claim": claim.says, "of": fingerprint(claim), **asdict(judged), "each": figures,
            "arms": each, "seeds": seeds, "asked": len(wanted), "budget": budget, "tuned_on": tuned_on(claim),
            "rates": rates, "work": work, "seconds": round(time.perf_counter() - began, 1)}


def run_claims(methods: Iterable[str] | None = None, out: Path = DOCS, console: Console | None = None,
               fresh: bool = False, budget: float | None = None) -> list[dict[str, Any]]:
    """Measure the claims of these methods (None: all), and write `results/claims.json` and `methods.md` under `out`.

    Rows of methods that are not measured now are kept as they were, unless their claim has changed since.
    """
    known = claimed()
    names = list(known if methods is None else methods)
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise RecipeError(f"claim {unknown[0]!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''} Allowed: "
                          f"{', '.join(known)}")
    path = out / "results" / "claims.json"
    rows = {r["method"]: r for r in json.loads(path.read_text())} if path.is_file() else {}
    rows = {n: r for n, r in rows.items() if n in known and r.get("of") == fingerprint(known[n].claim)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("claims", total=len(names))
        for name in names:
            rows[name] = weigh(name, known[name].claim, fresh, budget,
                               lambda what: progress.update(task, description=what))
            _write(path, [rows[n] for n in sorted(rows)])
            progress.advance(task)
    write_table(known, rows, out)
    return [rows[n] for n in names]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all: a run of hours may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    """Measure some methods' claims, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", nargs="*", help="ids of methods and layers, or `<id>:<word>`; none: all")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the docs")
    parser.add_argument("--fresh", action="store_true", help="use no cached runs")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="of each claim: no seed is begun after it; with few seeds a verdict is open")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the page anew from claims.json")
    given = parser.parse_args()
    if given.budget is not None and not given.budget > 0:
        raise RecipeError(f"--budget {given.budget:g} is not allowed; it must be > 0 seconds")
    console, table = Console(), Table("method", "figure", "seeds", "verdict")
    names = [] if given.table else given.method or None
    for row in run_claims(names, given.out, console, given.fresh, given.budget):
        table.add_row(row["method"], figure_text(row), f"{len(row['seeds'])} of {row['asked']}", row["verdict"])
    console.print(table)


if __name__ == "__main__":
    main()

"""Measure what every method claims, and write the results where the docs read them: `python -m evidence.claims`."""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import operator
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import evidence.rigs
import fedllm.methods
from evidence.rigs.topics import cache_dir
from fedllm.audits.registry import audit_classes
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim
from fedllm.methods.registry import METHODS, source_of
from fedllm.runs.layers import layer_classes
from fedllm.selectors.registry import selector_classes

HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
RELATIVE: Mapping[str, Callable[[float, float], float]] = {
    "own": lambda mine, _: mine, "ratio": lambda mine, other: mine / other,
    "difference": lambda mine, other: mine - other}
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
    what = (rig, method, seed, sorted(options.items(), key=repr), _code(method))
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    path = cache_dir() / "claims" / f"{rig}-{method}-{seed}-{key}.json"
    if path.is_file() and not (fresh and path.stat().st_mtime < BEGAN):
        return json.loads(path.read_text())
    metrics = {k: float(v) for k, v in run(method, seed, **options).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))
    return metrics


@functools.cache
def _code(method: str) -> str:
    """A digest of the files that a run's numbers depend on most: the method's, what methods share, and the rigs."""
    shared = Path(fedllm.methods.__file__ or "").parent.glob("_*.py")
    files = [claimed()[method].source, *shared, *Path(__file__).parent.glob("rigs*.py")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()


def judge(method: str, claim: Claim, seed: int, fresh: bool = False) -> tuple[float, bool]:
    """The figure of one seed, and whether the claim holds for it.

    `options["knobs"]` are the method's own and do not go to the baseline; all other options go to both.
    """
    method = method.partition(":")[0]
    mine = measure(claim.rig, method, seed, claim.options, fresh)[claim.metric]
    shared = {k: v for k, v in claim.options.items() if k != "knobs"}
    other = measure(claim.rig, claim.baseline, seed, shared, fresh)[claim.metric] if claim.baseline else 0.0
    figure = RELATIVE[claim.relative](mine, other)
    return figure, HOLDS[claim.holds](figure, claim.threshold)


def run_claims(methods: Iterable[str] | None = None, out: Path = DOCS, console: Console | None = None,
               fresh: bool = False) -> list[dict[str, Any]]:
    """Measure the claims of these methods (None: all), and write `results/claims.json` and `methods.md` under `out`.

    Rows of methods that are not measured now are kept as they were.
    """
    known = claimed()
    names = list(methods or known)
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise RecipeError(f"claim {unknown[0]!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''} Allowed: "
                          f"{', '.join(known)}")
    claims = {name: known[name].claim for name in names}
    path = out / "results" / "claims.json"
    rows = {r["method"]: r for r in json.loads(path.read_text())} if path.is_file() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("claims", total=sum(c.seeds for c in claims.values()))
        for name, claim in claims.items():
            began, figures, wins = time.perf_counter(), [], 0
            for seed in range(claim.seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                figure, holds = judge(name, claim, seed, fresh)
                figures.append(figure)
                wins += holds
                progress.advance(task)
            rows[name] = _row(name, claim, figures, wins, time.perf_counter() - began)
            _write(path, [rows[n] for n in sorted(rows) if n in known])
    write_table([rows[n] for n in sorted(rows) if n in known], out / "methods.md")
    return [rows[n] for n in names]


def _row(name: str, claim: Claim, figures: Sequence[float], wins: int, seconds: float) -> dict[str, Any]:
    return {"method": name, "claim": claim.says, "rig": claim.rig, "metric": claim.metric, "baseline": claim.baseline,
            "relative": claim.relative, "figure": float(np.mean(figures)), "holds": claim.holds,
            "threshold": claim.threshold, "seeds": claim.seeds, "wins": wins, "needed": claim.wins or claim.seeds,
            "each": list(figures), "pass": wins >= (claim.wins or claim.seeds), "seconds": round(seconds, 1)}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The methods' table, from cards and measured claims; a method without a measurement says so."""
    measured = {r["method"]: r for r in rows}
    lines = ["# Methods", "", "Generated by `python -m evidence.claims` from each method's card and from measured "
             "claims (`results/claims.json`); do not edit. A figure is the mean over seeds; `wins` is in how many "
             "seeds the claim held, and of how many.", "",
             "| method | title | topic | sends | claim | figure | wins | holds |", "|---|---|---|---|---|---|---|---|"]
    known = claimed()
    for name in sorted(known, key=lambda n: (known[n].chapter, n)):
        (card, claim, source, _), row = known[name], measured.get(name)
        link = f"[`{name}`](../{source.relative_to(Path(__file__).parents[1])})"
        result = [figure_text(row), f"{row['wins']}/{row['seeds']}", "yes" if row["pass"] else "**no**"] if row else (
            ["not measured", "", ""])
        cells = [link, card.title, card.topic, card.sends, claim.says, *result]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def figure_text(row: Mapping[str, Any]) -> str:
    """For example `global_loss - fedavg = -0.31 (< 0)`."""
    versus = {"own": "", "ratio": f" / {row['baseline']}", "difference": f" - {row['baseline']}"}[row["relative"]]
    return f"{row['metric']}{versus} = {row['figure']:.3g} ({row['holds']} {row['threshold']:g})"


def main() -> None:
    """Measure some methods' claims, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", nargs="*", help="ids of methods and layers, or `<id>:<word>`; none: all")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the docs")
    parser.add_argument("--fresh", action="store_true", help="use no cached runs")
    given = parser.parse_args()
    console = Console()
    table = Table("method", "figure", "wins", "holds")
    for row in run_claims(given.method or None, given.out, console, given.fresh):
        table.add_row(row["method"], figure_text(row), f"{row['wins']}/{row['seeds']}", "yes" if row["pass"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main()

"""The figures of a comparison: each arm's mean with its interval, and paired differences with their tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedllm.comparisons.chance import LEVEL, held_together, interval, interval_and_p, seeds_needed
from fedllm.methods.registry import method_class
from fedllm.report.facts import falls, is_share, label, mean_metric, number, shown
from fedllm.runs.result import Result

Verdict = Literal["better", "worse", "open", "equal"]
GLOBAL, OWN = "global test", "clients' own tests"


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread | None:
        """None of no figures."""
        each = np.array(figures, float)
        return cls(float(each.mean()), *interval(each)) if len(each) else None


@dataclass(frozen=True)
class Difference:
    """An arm's figure less the baseline's, seed by seed."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    together: float = 1.0
    """p as it counts among all differences of the table (Holm)."""
    verdict: Verdict = "open"


@dataclass(frozen=True)
class Row:
    """One arm of a table."""

    arm: str
    method: str
    figures: Mapping[int, float]
    """Seed -> the metric."""
    quality: Spread | None
    own: Spread | None
    """The same metric on the clients' own test rows, each client with the model that it would use."""
    up: float
    """Bytes of a run's rounds, mean over seeds; so `down`, and `seconds`."""
    down: float
    seconds: float
    memory: int
    """Bytes; the most of any seed."""
    trained: int | None
    rates: Mapping[str, Any]
    cells: Mapping[int, str]
    """Seed -> the run's folder."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Seed -> why there is no figure."""
    difference: Difference | None = None
    front: bool = False
    """Whether no other arm is at least as good for no more bytes."""


@dataclass(frozen=True)
class Table:
    """One setting, told."""

    setting: str
    about: str
    metric: str
    on: str
    better: Literal["max", "min"]
    baseline: str
    rows: Sequence[Row]
    says: str

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def metric_of(results: Mapping[str, Sequence[Result]]) -> tuple[str | None, str, dict[str, str]]:
    """The most telling metric that every arm has, on the global test or else on clients' own rows; methods' own
    directions with it."""
    own = {n: d for runs in results.values() for r in runs for n, d in r.metrics.items()}
    runs = [r for each in results.values() for r in each]
    for on in (GLOBAL, OWN):
        told = [figures_on(r, on) for r in runs]
        if told and all(told):
            names = [n for n in shown(own, *told) if all(n in t for t in told)]
            if names:
                return names[0], on, own
    return None, GLOBAL, own


def figures_on(result: Result, on: str) -> dict[str, float]:
    """The metrics of a run on the global test, or the means of its clients' own."""
    e = result.evaluation
    if on == GLOBAL:
        return {k: float(v) for k, v in (e.get("global") or {}).items() if k != "n"}
    names = {n for m in e.get("clients", {}).values() for n in m if n != "n"}
    return {n: v for n in names if (v := mean_metric(e["clients"], n)) is not None}


def difference(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have."""
    both = sorted(set(mine) & set(other))
    if not both:
        return None
    margins = np.array([mine[s] - other[s] for s in both])
    low, high, p = interval_and_p(margins)
    return Difference(float(margins.mean()), low, high, p, len(both))


def judged(found: Sequence[Difference | None], less_is_better: bool) -> list[Difference | None]:
    """Each with its verdict: better or worse where the interval lies on one side of 0 and the test says so too, with
    all of the table's tests together; equal where it is 0 on every seed."""
    there = [d for d in found if d is not None]
    together = iter(held_together([d.p for d in there]))
    out: list[Difference | None] = []
    for d in found:
        if d is None:
            out.append(None)
            continue
        p = next(together)
        sure = p <= 1 - LEVEL + 1e-12 and (d.low > 0 or d.high < 0)
        good = (d.mean < 0) == less_is_better
        verdict: Verdict = "equal" if d.low == d.high == d.mean == 0 else "open" if not sure else (
            "better" if good else "worse")
        out.append(replace(d, together=p, verdict=verdict))
    return out


def on_front(quality: Sequence[float | None], cost: Sequence[float], less_is_better: bool) -> list[bool]:
    """Which points no other one beats: as good for fewer bytes, or better for no more."""
    worth = [None if q is None else -q if less_is_better else q for q in quality]
    return [w is not None and not any(
        v is not None and v >= w and c <= cost[i] and (v > w or c < cost[i]) for v, c in zip(worth, cost, strict=True))
        for i, w in enumerate(worth)]


def sentence(rows: Sequence[Row], baseline: str, metric: str, on: str, less_is_better: bool) -> str:
    """Which differences mean something, and which do not."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        if (d := row.difference) is not None:
            by = {"better": f"by {gap(d.mean, metric)}", "worse": f"by {gap(d.mean, metric)}"}.get(d.verdict, "")
            parts.setdefault(d.verdict, []).append(f"{row.arm} ({by})" if by else row.arm)
    if not parts:
        return f"There is nothing to hold against {baseline}: no other arm has a figure."
    words = {"better": "better: {}", "worse": "worse: {}", "equal": "the same on every seed: {}",
             "open": "not to be told from it: {}"}
    said = "; ".join(words[v].format(", ".join(parts[v])) for v in words if v in parts)
    tests, seeds = sum(map(len, parts.values())), min(d.seeds for r in rows if (d := r.difference))
    few = ""
    if "open" in parts and seeds < (need := seeds_needed(tests)):
        few = (f" ({seeds} seed{'s' * (seeds > 1)} can show none of {tests} difference{'s' * (tests > 1)}; {need} or "
               "more could)")
    return f"Against {baseline}, by {label(metric)} on the {on}: {said}{few}."


def gap(value: float, metric: str) -> str:
    """A difference as people read it: points of a share, or the number."""
    return f"{abs(100 * value):.1f} points" if is_share(metric) else f"{abs(value):.3g}"


def between(spread: Spread | None, metric: str) -> str:
    """`83.1 % (81.0 to 85.2)`."""
    if spread is None:
        return "-"
    low, high = (number(x, metric).removesuffix(" %") for x in (spread.low, spread.high))
    return f"{number(spread.mean, metric)} ({low} to {high})"


def signed(d: Difference | None, metric: str) -> str:
    """`+1.2 (0.3 to 2.0), p 0.031`."""
    if d is None:
        return ""
    by = 100.0 if is_share(metric) else 1.0
    form = "+.1f" if is_share(metric) else "+.3g"
    return f"{by * d.mean:{form}} ({by * d.low:{form}} to {by * d.high:{form}}), p {d.p:.3g}"


def table_of(setting: str, about: str, baseline: str, arms: Mapping[str, Mapping[str, Any]],
             results: Mapping[str, Mapping[int, Result]]) -> Table:
    """The table of one setting. `arms`: label -> method, rates, trained, cells, failed; `results`: label -> seed ->
    its run."""
    metric, on, own = metric_of({a: list(r.values()) for a, r in results.items() if r})
    less = metric is not None and falls(metric, own)
    figures = {a: {s: f[metric] for s, r in runs.items() if metric in (f := figures_on(r, on))}
               for a, runs in results.items()}
    differences = dict(zip(arms, judged([None if a == baseline else difference(figures[a], figures[baseline])
                                         for a in arms], less), strict=True))
    rows = []
    for name, arm in arms.items():
        runs = list(results[name].values())
        mine = [f[metric] for r in runs if metric in (f := figures_on(r, OWN))]

        def mean(values: Sequence[float]) -> float:
            return float(np.mean(values)) if values else float("nan")

        rows.append(Row(
            name, arm["method"], figures[name], Spread.of(list(figures[name].values())), Spread.of(mine),
            mean([r.bytes["up"] for r in runs]), mean([r.bytes["down"] for r in runs]),
            mean([r.seconds for r in runs]), max((r.peak_memory_bytes for r in runs), default=0), arm["trained"],
            arm["rates"], arm["cells"], arm["failed"], differences[name]))
    pooled = [bool(method_class(r.method).simulation_only) for r in rows]  # it sends nothing, and has all rows
    front = on_front([None if p or r.quality is None else r.quality.mean for r, p in zip(rows, pooled, strict=True)],
                     [r.up + r.down for r in rows], less)
    rows = [replace(r, front=f) for r, f in zip(rows, front, strict=True)]
    says = sentence(rows, baseline, metric, on, less) if metric else "No metric was measured for every arm."
    return Table(setting, about, metric or "", on, "min" if less else "max", baseline, rows, says)

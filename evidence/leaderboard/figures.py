"""The figures of one row: means over seeds with their intervals, costs, and what the server sees."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.leaderboard.cells import cost_of
from fedllm.comparisons.chance import LEVEL
from fedllm.comparisons.figures import GLOBAL, OWN, figures_on
from fedllm.core.method import Method
from fedllm.methods.registry import method_class
from fedllm.report.facts import falls, shown
from fedllm.runs.result import Result

METRICS = ("accuracy", "loss")
"""Told where a run has them; a method's own metrics stand beside."""


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, each, and the 95 % interval of the mean by Student's t: of three seeds a bootstrap would show no more than
    the span between the least and the greatest."""
    from scipy import stats

    if not values:
        return None
    mean = float(np.mean(values))
    half = 0.0
    if len(values) > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    told = {"mean": mean, "low": mean - half, "high": mean + half} if len(values) > 1 else {
        "mean": mean, "low": None, "high": None}
    return {k: v if v is None else round(v, 5) for k, v in told.items()} | {"each": [round(v, 5) for v in values]}


def measured(folders: Mapping[int, Path]) -> dict[str, Any]:
    """What a row tells of its finished cells (seed -> folder)."""
    runs = {seed: Result.load(folder) for seed, folder in folders.items()}
    each = list(runs.values())
    energy = [e for r in each if (e := r.reports.get("EdgeEnergy"))]
    costs = [cost_of(folder) for folder in folders.values()]
    cpus = [cpu for c in costs if (cpu := c.get("cpu_seconds")) is not None]

    def mean(values: Sequence[float]) -> float | None:
        return float(f"{np.mean(values):.5g}") if values else None

    quality = {}
    for word, on in (("global", GLOBAL), ("personal", OWN)):
        told = [figures_on(r, on) for r in each]
        own = each[0].metrics
        names = [*METRICS, *(n for n in shown(own, *told) if n not in METRICS)]
        quality[word] = {n: {**s, "better": "min" if falls(n, own) else "max"} for n in names
                         if (s := spread([t[n] for t in told if n in t]))}
    return {"seeds": list(runs), **quality, "up": mean([r.bytes["up"] for r in each]),
            "down": mean([r.bytes["down"] for r in each]), "cpu_seconds": mean(cpus),
            "memory": max(r.peak_memory_bytes for r in each), "joules": mean([e["joules"] for e in energy]),
            "tokens": mean([e["tokens"] for e in energy]), "flops": mean([e["flops"] for e in energy]),
            "remember": max((c.get("remember") or 0 for c in costs), default=0),
            "own_part": any("views" in r.evaluation for r in each),
            "digests": {str(seed): r.state_digest for seed, r in runs.items()}}


def said_of(method: str) -> dict[str, Any]:
    """What the card says that the server sees, and which of the method's traits a reader may look for."""
    kind = method_class(method)
    card = kind.card  # `serves` of some follows from their knobs: those have a server's model under some of them
    return {"title": card.title, "topic": card.topic, "sends": card.sends, "kinds": list(card.kinds),
            "pooled": bool(kind.simulation_only), "serves": kind.serves is not False, "ranks": kind.reads_ranks,
            "mixes": kind.mixes, "gradients": descends(kind)}


def descends(kind: type[Method]) -> bool:
    """Whether its client functions ask for gradients: somewhere in its file, or in one that it inherits from."""
    files = {inspect.getsourcefile(k) for k in kind.__mro__ if k.__module__.startswith("fedllm.methods.")
             or k is kind}
    return any(re.search(r"\.(fit|backward)\(", Path(f).read_text()) for f in files if f)

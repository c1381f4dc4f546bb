"""What the report and the model card tell of a run, read from its folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.record import is_test
from fedllm.runs.folder import RunFolder
from fedllm.runs.result import Result
from fedllm.tasks.registry import metrics

HEADLINE = tuple(metrics())
"""Metrics of all tasks, the most telling of each first, `loss` last."""
SHARED, NEAREST = "what all share, alone", "with the nearest client's part"
"""Rows of a comparison where clients keep a part of the model."""
TROUBLE = ("left_out", "missing", "refused", "checkpoint_failed", "replies_lost", "stopped", "resumed",
           "budget_spent")


@dataclass
class Facts:
    """A run's record, summed up."""

    recipe: dict[str, Any]
    rounds: list[Mapping[str, Any]] = field(default_factory=list)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    trouble: list[Mapping[str, Any]] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    """What the run said of its data, model or settings, each once."""
    client_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Client -> bytes "up" and "down" of the rounds."""
    messages: dict[tuple[bool, str, str], int] = field(default_factory=dict)
    """(whether to test, phase, direction) -> how many crossed the wire."""
    clear: dict[tuple[bool, str], set[str]] = field(default_factory=dict)
    """(whether to test, phase) -> what replies held that whoever got them could read."""
    hidden: dict[tuple[bool, str], set[str]] = field(default_factory=dict)
    """The same of layers that kept other parts of them from being read."""
    clients: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def read_facts(folder: RunFolder) -> Facts:
    """Everything in one pass over the events."""
    facts = Facts(yaml.safe_load((folder.path / "recipe.yaml").read_text()))
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: {"up": 0, "down": 0})
    for event in folder.events():
        kind = event["kind"]
        if kind == "wire":
            test = is_test(event["phase"], event.get("purpose"))
            sizes[event["client"]][event["direction"]] += 0 if test else event["bytes"]
            key = (test, event["phase"], event["direction"])
            for of, name in ((facts.clear, "clear"), (facts.hidden, "hidden")):
                if said := event.get(name):
                    of.setdefault(key[:2], set()).update(said.split(", "))
            facts.messages[key] = facts.messages.get(key, 0) + 1
        elif kind == "round":
            facts.rounds.append(event)
        elif kind == "evaluation":
            facts.evaluations.append(event)
        elif kind == "caution":
            facts.cautions += [event["why"]] if event["why"] not in facts.cautions else []
        elif kind in TROUBLE:
            facts.trouble.append(event)
    facts.client_bytes = dict(sizes)
    facts.clients = _json(folder.path / "clients.json")
    facts.samples = _json(folder.path / "samples.json")
    return facts


def _json(path: Path) -> list[Any]:
    return json.loads(path.read_text()) if path.exists() else []


def shown(own: Mapping[str, str], *found: Mapping[str, Any] | None) -> list[str]:
    """The metrics that are there, the most telling first: a method's own (`own`: name -> direction) before the rest."""
    return [n for n in (*own, *(h for h in HEADLINE if h not in own)) if any(n in (m or {}) for m in found)]


def headline(found: Mapping[str, Any] | None, own: Mapping[str, str]) -> str | None:
    """The most telling metric that is there."""
    return next(iter(shown(own, found)), None)


def compared(result: Result) -> tuple[list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]], list[str]]:
    """The rows of `comparison` that have figures, and the names of those."""
    rows = [(name, g, c) for name, g, c in comparison(result) if g or c]
    return rows, shown(result.metrics, *(m for _, g, c in rows for m in (g, *c.values())))


def figures(result: Result) -> tuple[list[tuple[bool, str]], list[tuple[str, list[str]]]]:
    """`compared` as a table of texts: of each column whether it is of clients' own tests and its metric; of each row
    its label and cells. A column in which no row has a figure is left out: it would take room from the others."""
    rows, names = compared(result)
    every = [(own, n) for own in (False, True) for n in names]
    found = [(label, [mean_metric(c, n) if own else (g or {}).get(n) for own, n in every]) for label, g, c in rows]
    kept = [i for i in range(len(every)) if any(values[i] is not None for _, values in found)]
    return ([every[i] for i in kept],
            [(label, [number(values[i], every[i][1]) for i in kept]) for label, values in found])


def comparison(result: Result) -> list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]]:
    """(label, global metrics, clients' metrics): before, the baselines, and the run itself between them."""
    e, baselines = result.evaluation, result.evaluation.get("baselines", {})
    rows = [("before", e.get("before", {}).get("global"), e.get("before", {}).get("clients", {}))]
    if (local := baselines.get("local_only")) is not None:
        rows.append(("local only", local["global"], local["clients"]))
    if views := e.get("views"):
        rows += [(SHARED, None, views["global"]), (NEAREST, None, views["nearest"])]
    rows.append((f"federated ({result.method})", e.get("global"), e.get("clients", {})))
    if (pooled := baselines.get("centralized")) is not None:
        rows.append(("centralized", pooled["global"], pooled["clients"]))
    return rows + [(name.replace("_", " "), rule["global"], rule["clients"])
                   for name, rule in rules(result).items()]


def rules(result: Result) -> dict[str, Mapping[str, Any]]:
    """The evaluations of rules without a model, which stand among the baselines."""
    return {name: e for name, e in result.evaluation.get("baselines", {}).items()
            if name not in ("local_only", "centralized")}


def views(result: Result) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Clients' own tests by whose model it was, under the names of the report; what there is not is left out."""
    e = result.evaluation
    local = (e.get("baselines", {}).get("local_only") or {}).get("clients", {})
    found = {"before": (e.get("before") or {}).get("clients", {}), "local only": local}
    if own := e.get("views"):
        found |= {"global": own["global"], "nearest": own["nearest"], "personal": e.get("clients", {})}
    else:
        found["global"] = e.get("clients", {})
    return {name: figures for name, figures in found.items() if figures}


def mean_metric(clients: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """The plain mean of a metric over the clients that have it."""
    values = [m[name] for m in clients.values() if name in m]
    return sum(values) / len(values) if values else None


def number(value: float | None, name: str = "") -> str:
    """A metric as people read it: shares in percent, losses with three digits."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.3f}"


def is_share(name: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown in percent."""
    return name in metrics() and metrics()[name].share


def falls(name: str, own: Mapping[str, str]) -> bool:
    """Whether less is better; what neither the method (`own`) nor a task says is a gain."""
    return (own.get(name) or (metrics()[name].best if name in metrics() else "max")) == "min"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s"


def label(metric: str, own: Mapping[str, str] | None = None) -> str:
    """`exact_match` -> `exact match`; a method's own metric says which way is better."""
    way = {"max": " (higher is better)", "min": " (lower is better)"}.get((own or {}).get(metric, ""), "")
    return metric.replace("_", " ") + way

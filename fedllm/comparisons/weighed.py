"""By what an arm's rates are chosen, and what is to be minded of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedllm.comparisons.design import Design, pairs
from fedllm.comparisons.figures import GLOBAL, OWN, figures_on
from fedllm.report.facts import falls, shown
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result

WORK = ("rounds", "local.steps", "local.epochs", "local.batch_size", "local.accumulate", "clients.per_round",
        "data.limit")
"""Keys that say how much work a run does; arms that differ in them are told apart by more than what they are."""


def worth(results: Sequence[Result]) -> float:
    """The mean loss on the clients' own test rows (on the global test where they keep none); where no loss is told, the
    most telling metric, turned so that less is better. Infinite where a run has no figure."""
    values = []
    for result in results:
        own, whole = figures_on(result, OWN), figures_on(result, GLOBAL)
        name = next((n for n in ("loss", *shown(result.metrics, own, whole)) if n in own or n in whole), None)
        if result.failed or name is None:
            return math.inf
        value = own.get(name, whole.get(name, math.nan))
        values.append(value if falls(name, result.metrics) else -value)
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else math.inf


def version_of(run: Path) -> str:
    """What a cell ran with."""
    if not (run / "recipe.yaml").is_file():
        return ""
    said = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")).get("versions", {})
    return ", ".join(f"{k} {v}" for k, v in said.items())


Key = tuple[str, str]
"""Setting and arm."""


def cautions(design: Design, recipes: Mapping[Key, Recipe], rates: Mapping[Key, Mapping[str, Any]],
             versions: Sequence[str], jobs: int) -> list[str]:
    """What may not be meant."""
    out = []
    for s in design.settings:
        whole = [recipes[s.name, a.label].model_dump() for a in s.arms]
        for key in WORK:
            section, _, knob = key.partition(".")
            if len({repr(w[section].get(knob) if knob else w[section]) for w in whole}) > 1:
                out.append(f"the arms do unequal work: they differ in {key}")
    for s, a in pairs(design):
        for key, values in design.grid.items():
            if (value := rates[s.name, a.label].get(key)) in ends(values):
                out.append(f"{' '.join(filter(None, (s.name, a.label)))} took the last value of its grid ({key} = "
                           f"{value}); a wider grid may serve it better")
    if len(versions) > 1:
        out.append(f"the cells ran with {len(versions)} sets of versions: {'; '.join(versions)}")
    if jobs > 1:
        out.append(f"{jobs} cells ran at once, which shows in their seconds")
    return list(dict.fromkeys(out))


def ends(values: Sequence[Any]) -> list[Any]:
    """The smallest and the largest of three numbers or more; of fewer there is no middle to prefer."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return [min(numbers), max(numbers)] if len(numbers) == len(values) > 2 else []

"""How far apart clients end that want different things: quadratic losses of different curvatures and minima."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.rigs.trials import Metrics, quadratic_world


def fairness(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 40,
             local: Mapping[str, Any] | None = None) -> Metrics:
    """`spread`: the deviation of six clients' losses of the served model; `mean` and `worst` of them."""
    run, a, c = quadratic_world(method, seed, knobs, rounds, 6, 10, {"steps": 10, **(local or {})})
    w = run.method.served(run.state)[0]["w.weight"][0]
    each = 0.5 * (a * (w - c).pow(2)).sum(1)
    return {"spread": float(each.std()), "mean": float(each.mean()), "worst": float(each.max()), **run.work()}


RIGS = {"fairness": fairness}

"""Metrics by name, with the direction that is better: those of every method, and a method's own."""

from __future__ import annotations

from fedllm.core.errors import CompositionError
from fedllm.core.layer import name_of
from fedllm.core.method import Method
from fedllm.tasks.registry import metrics

STANDARD = {name: metric.best for name, metric in metrics().items()}
"""Metrics of all tasks, which every method may return, and which way is better."""


def check_metrics(method: Method) -> None:
    """CompositionError for a metric without a direction, or under a name that means something else already."""
    for name, way in method.metrics.items():
        if way not in ("max", "min") or name == "n":
            raise CompositionError(f"method '{name_of(method)}' declares metrics[{name!r}] = {way!r}; allowed "
                                   "are 'max' and 'min', for any name but 'n'")
        if STANDARD.get(name, way) != way:
            raise CompositionError(f"method '{name_of(method)}' declares metrics[{name!r}] = {way!r}, and "
                                   f"'{name}' is a metric of a task, of which {STANDARD[name]!r} is better; give "
                                   "its own another name")

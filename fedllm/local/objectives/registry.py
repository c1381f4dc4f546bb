"""Objectives are found by walking this folder: the file's stem is the objective's name."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.local.objective import Objective


@functools.cache
def objectives() -> dict[str, type[Objective]]:
    """Name -> class."""
    import fedllm.local.objectives as room

    found = {}
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Objective) and cls.__module__ == module.__name__:
                found[info.name] = cls
    return dict(sorted(found.items()))


def make_objective(name: str, **knobs: Any) -> Objective:
    """An objective by its name with these knobs; an unknown name is refused with the nearest one."""
    if name not in objectives():
        near = difflib.get_close_matches(name, objectives(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise RecipeError(f"objective = {name!r} is unknown{hint} Allowed: {', '.join(objectives())}")
    return objectives()[name].make(knobs, f"objective.{name}")

"""Simulated sources are found by walking this folder; their knobs are the recipe's section `data.simulated`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.method import Knobs
from fedllm.data.sources import Table
from fedllm.tasks.row import nearest

PREFIX = "sim:"
"""Of a source that is made: `data.source: sim:stations`."""


class Simulated(Knobs):
    """The knobs of a simulated source, a frozen dataclass, and the tables that they make: as a user's files would be.
    """

    def tables(self, seed: int) -> Sequence[Table]:
        """Equal knobs and seed give equal rows."""
        raise NotImplementedError


@functools.cache
def kinds() -> dict[str, type[Simulated]]:
    """Every simulated source by name."""
    import fedllm.data.simulated as room

    found = {}
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        found |= {info.name: c for _, c in inspect.getmembers(module, inspect.isclass)
                  if issubclass(c, Simulated) and c.__module__ == module.__name__ and c is not Simulated}
    return found


def simulated_tables(source: str, knobs: Mapping[str, Any] | None, seed: int) -> list[Table]:
    """The tables of `sim:NAME`; an unknown name or knob is refused with the nearest one."""
    name = source.removeprefix(PREFIX)
    if name not in kinds():
        raise RecipeError(f"data.source = {source!r} is unknown{nearest(name, kinds()) or '.'} Allowed: "
                          f"{', '.join(PREFIX + n for n in kinds())}")
    return list(kinds()[name].make(dict(knobs or {}), "data.simulated").tables(seed))

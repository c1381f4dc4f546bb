"""Simulated sources are found by walking this folder; their knobs are the recipe's section `data.simulated`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import Knobs
from fedllm.core.layer import name_of
from fedllm.data.table import Table
from fedllm.tasks.row import nearest

PREFIX = "sim:"
"""Of a source that is made: `data.source: sim:stations`."""


class Simulated(Knobs):
    """The knobs of a simulated source, a frozen dataclass, and the tables that they make: as a user's files would be.
    """

    def tables(self, seed: int) -> Sequence[Table]:
        """Equal knobs and seed give equal rows."""
        raise NotImplementedError

    def public(self, seed: int) -> Sequence[Table]:
        """Rows that are nobody's (`data.public: sim:NAME`)."""
        raise RecipeError(f"data.public: the simulated source '{name_of(self)}' makes no public rows")

    def test(self, seed: int) -> Sequence[Table]:
        """Rows of a global test apart (`data.test: sim:NAME`)."""
        raise RecipeError(f"data.test: the simulated source '{name_of(self)}' makes no test apart")


@functools.cache
def kinds() -> dict[str, type[Simulated]]:
    """Every simulated source by name."""
    import fedllm.data.simulated as room

    found: dict[str, type[Simulated]] = {}
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass)
               if issubclass(c, Simulated) and c.__module__ == module.__name__ and c is not Simulated]
        found |= dict.fromkeys([info.name] * len(own), *own)
    return found


def simulated_tables(source: str, knobs: Mapping[str, Any] | None, seed: int, part: str = "source") -> list[Table]:
    """The tables of `sim:NAME`, or its `public` or `test` ones; an unknown name or knob is refused with the nearest
    one."""
    name = source.removeprefix(PREFIX)
    if name not in kinds():
        raise RecipeError(f"data.{part} = {source!r} is unknown{nearest(name, kinds()) or '.'} Allowed: "
                          f"{', '.join(PREFIX + n for n in kinds())}")
    made = kinds()[name].make(dict(knobs or {}), "data.simulated")
    return list({"source": made.tables, "public": made.public, "test": made.test}[part](seed))

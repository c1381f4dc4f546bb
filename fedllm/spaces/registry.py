"""Spaces are found by walking this folder: the file's stem is the name, and there is no list to edit.

A package can bring spaces of its own by entry points of the group `fedllm.spaces`, each naming a module that holds one.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.spaces.space import Space

GROUP = "fedllm.spaces"


@functools.cache
def space_classes() -> dict[str, type[Space]]:
    """Name -> class, of this room and of every installed package that brings some."""
    room = importlib.import_module(__name__.rpartition(".")[0])
    names = [f"{room.__name__}.{info.name}" for info in pkgutil.iter_modules(room.__path__)]
    found = {}
    for name in names:
        if kind := spaces_in(importlib.import_module(name)):
            found[kind[0].__module__.rpartition(".")[2]] = kind[0]
    for entry in importlib.metadata.entry_points(group=GROUP):
        kind = spaces_in(importlib.import_module(entry.module))
        if len(kind) != 1:
            raise RecipeError(f"entry point {entry.name!r} of {GROUP}: {entry.module} must hold just one space, a "
                              f"frozen dataclass; it holds {[k.__name__ for k in kind]}")
        if (stem := entry.module.rpartition(".")[2]) in found:
            raise RecipeError(f"entry point {entry.name!r} of {GROUP}: there is a space {stem!r} already; rename its "
                              "file")
        found[stem] = kind[0]
    return dict(sorted(found.items()))


def spaces_in(module: ModuleType) -> list[type[Space]]:
    """The spaces that a module defines: those that are dataclasses; others are the common part of several."""
    return [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__
            and issubclass(c, Space) and "__dataclass_fields__" in c.__dict__]


def space_class(name: str) -> type[Space]:
    """The space in the file `<name>.py`; an unknown name is refused with the nearest one."""
    known = space_classes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"space.name = {name!r} is unknown{hint} Allowed: {', '.join(known)}")
    return known[name]


def make_space(name: str, **knobs: Any) -> Space:
    """A space by its name with these knobs."""
    values: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    return space_class(name).make(values, "space")


def of_peft(kind: str) -> type[Space] | None:
    """The space that reads PEFT's adapters of this kind ("LORA"), or None."""
    return next((c for c in space_classes().values() if vars(c).get("peft") == kind), None)

"""Selectors are found by walking this folder: the file's stem is the name."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.select import Selector


@functools.cache
def selector_classes() -> dict[str, type[Selector]]:
    """Name -> class."""
    room = importlib.import_module(__name__.rpartition(".")[0])
    found = {}
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass)
               if c.__module__ == module.__name__ and issubclass(c, Selector) and "card" in c.__dict__]
        if len(own) == 1:
            found[info.name] = own[0]
    return found


def make_selector(name: str, knobs: Mapping[str, Any], path: str = "select") -> Selector:
    """A selector by its name with these knobs; an unknown name is refused with the nearest one."""
    kinds = selector_classes()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"{path}.name = {name!r} is unknown{hint} Allowed: {', '.join(kinds)}")
    return kinds[name].make(knobs, path)

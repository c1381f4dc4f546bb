"""Layers are found like methods: a file `<name>.py` in one of the rooms that hold layers, with one Layer in it."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.layer import Layer
from fedllm.core.method import Knobs

ROOMS = ("privacy", "wire", "attacks", "defenses")


@functools.cache
def layer_classes() -> dict[str, type[Layer]]:
    """Layer name -> class, for every room that exists."""
    found = {}
    for room in ROOMS:
        if importlib.util.find_spec(f"fedllm.{room}") is None:
            continue
        package = importlib.import_module(f"fedllm.{room}")
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            own = [c for _, c in inspect.getmembers(module, inspect.isclass)
                   if c.__module__ == module.__name__ and issubclass(c, Layer) and not inspect.isabstract(c)]
            if len(own) == 1:
                found[info.name.rsplit(".", 1)[-1]] = own[0]
    return found


def make_layer(name: str, knobs: Mapping[str, Any], path: str) -> Layer:
    """A layer by its name with these knobs; an unknown name is refused with the nearest one."""
    known = layer_classes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"{path}.name = {name!r} is unknown{hint} Allowed: {', '.join(known) or 'no layer yet'}")
    kind: Any = known[name]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    if issubclass(kind, Knobs):
        return kind.make(values, path)
    try:
        return kind(**values)
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from None

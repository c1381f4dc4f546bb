"""Layers by name: a file `<name>.py` in one of the rooms that hold layers, an entry point, or a plugin file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.found import Room
from fedllm.core.knobs import Knobs
from fedllm.core.layer import Layer

LAYERS: Room[Layer] = Room("layers", lambda kind: issubclass(kind, Layer) and not inspect.isabstract(kind),
                           "fedllm.privacy", "fedllm.wire", "fedllm.attacks", "fedllm.defenses")


def layer_classes() -> Mapping[str, type[Layer]]:
    """Layer name -> class."""
    return LAYERS


def make_layer(name: str, knobs: Mapping[str, Any], path: str) -> Layer:
    """A layer by its name with these knobs; an unknown name is refused with the nearest one."""
    kind: Any = LAYERS.find(name, f"{path}.name")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    if issubclass(kind, Knobs):
        return kind.make(values, path)
    try:
        return kind(**values)
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from None

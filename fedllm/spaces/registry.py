"""Spaces by name: a file of this folder, an installed package's entry point, or a plugin file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.found import Room
from fedllm.spaces.space import Space

SPACES: Room[Space] = Room("spaces", lambda kind: issubclass(kind, Space) and "__dataclass_fields__" in kind.__dict__,
                           "fedllm.spaces")


def make_space(name: str, **knobs: Any) -> Space:
    """A space by its name with these knobs; an unknown name is refused with the nearest one."""
    values: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    return SPACES.find(name, "space.name").make(values, "space")


def of_peft(kind: str) -> type[Space] | None:
    """The space that reads PEFT's adapters of this kind ("LORA"), or None."""
    return next((c for c in SPACES.values() if vars(c).get("peft") == kind), None)

"""Selectors by name: a file of this folder, an installed package's entry point, or a plugin file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.found import Room
from fedllm.core.select import Selector

SELECTORS: Room[Selector] = Room("selectors", lambda kind: issubclass(kind, Selector) and "card" in kind.__dict__,
                                 "fedllm.selectors")


def selector_classes() -> Mapping[str, type[Selector]]:
    """Name -> class."""
    return SELECTORS


def make_selector(name: str, knobs: Mapping[str, Any], path: str = "select") -> Selector:
    """A selector by its name with these knobs; an unknown name is refused with the nearest one."""
    return SELECTORS.find(name, f"{path}.name").make(knobs, path)

"""Audits are found like methods: a file `<id>.py` in this room with one class that has a card."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

import fedllm.audits
from fedllm.core.method import Card, Knobs


@functools.cache
def audit_classes() -> dict[str, type[Knobs]]:
    """Audit id -> class."""
    found: dict[str, type[Knobs]] = {}
    for info in pkgutil.iter_modules(fedllm.audits.__path__):
        module = importlib.import_module(f"fedllm.audits.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and isinstance(kind.__dict__.get("card"), Card):
                found[info.name] = kind
    return found

"""Audits are found like methods: a file `<id>.py` in this room with one class that has a card.

So are attacks and defenses that are no layer of a round, such as those of a pipeline.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

import fedllm.attacks
import fedllm.audits
import fedllm.defenses
from fedllm.core.layer import Layer
from fedllm.core.method import Card, Knobs


@functools.cache
def audit_classes() -> dict[str, type[Knobs]]:
    """Audit id -> class."""
    found: dict[str, type[Knobs]] = {}
    for room in (fedllm.audits, fedllm.attacks, fedllm.defenses):
        for info in pkgutil.iter_modules(room.__path__):
            module = importlib.import_module(f"{room.__name__}.{info.name}")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                mine = kind.__module__ == module.__name__ and not issubclass(kind, Layer)
                if mine and isinstance(kind.__dict__.get("card"), Card):
                    found[info.name] = kind
    return found

"""Methods by name: a file `<chapter>/<id>.py` of this folder, an installed package's entry point, or a plugin file."""

from __future__ import annotations

import inspect
from typing import Any

from fedllm.core.found import Room
from fedllm.core.method import Method

METHODS: Room[Method] = Room("methods", lambda kind: issubclass(kind, Method) and "card" in kind.__dict__,
                             "fedllm.methods", chapters=True)


def modules() -> dict[str, str]:
    """Method id -> dotted module name of those that come with fedllm, without importing any of them."""
    return METHODS.ours


def method_class(name: str) -> type[Method]:
    """The method of this id; an unknown one is refused with the nearest."""
    return METHODS.find(name, "method.name")


def make_method(name: str, **knobs: Any) -> Method:
    """A method by its id with these knobs."""
    return method_class(name).make({k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}, "method")


def source_of(name: str) -> str:
    """Path of the method's file."""
    return inspect.getsourcefile(method_class(name)) or ""

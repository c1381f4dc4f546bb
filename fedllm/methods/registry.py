"""Methods are found by walking this folder: the file's stem is the method's id, and there is no list to edit."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.method import Method


@functools.cache
def modules() -> dict[str, str]:
    """Method id -> dotted module name, without importing any method."""
    import fedllm.methods as room

    found = {}
    for info in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        chapter, _, stem = info.name.removeprefix(room.__name__ + ".").partition(".")
        if stem and not info.ispkg and chapter:
            found[stem] = info.name
    return dict(sorted(found.items()))


def method_class(name: str) -> type[Method]:
    """The method in the file `<name>.py`; an unknown name is refused with the nearest one."""
    if name not in modules():
        near = difflib.get_close_matches(name, modules(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"method.name = {name!r} is unknown{hint} Allowed: {', '.join(modules())}")
    module = importlib.import_module(modules()[name])
    own = [c for _, c in inspect.getmembers(module, inspect.isclass)
           if c.__module__ == module.__name__ and issubclass(c, Method) and "card" in c.__dict__]
    if len(own) != 1:
        found = [c.__name__ for c in own]
        raise RecipeError(f"{module.__name__} must hold just one method with a card; it holds {found}")
    return own[0]


def make_method(name: str, **knobs: Any) -> Method:
    """A method by its id with these knobs."""
    return method_class(name).make({k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}, "method")


def source_of(name: str) -> str:
    """Path of the method's file."""
    return inspect.getsourcefile(method_class(name)) or ""

"""Trackers are found by walking this folder."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Sequence

from fedllm.core.errors import RecipeError
from fedllm.trackers.tracker import Tracker

PARTS = ("tracker", "registry", "stream")


@functools.cache
def trackers() -> dict[str, type[Tracker]]:
    """Every tracker by the name of its file."""
    import fedllm.trackers as room

    found = {}
    for info in pkgutil.iter_modules(room.__path__):
        if info.name not in PARTS:
            module = importlib.import_module(f"{room.__name__}.{info.name}")
            found[info.name] = next(c for _, c in inspect.getmembers(module, inspect.isclass)
                                    if issubclass(c, Tracker) and c is not Tracker)
    return found


def known(names: Sequence[str], key: str = "track") -> list[str]:
    """These names, each of a tracker and once; RecipeError else."""
    for name in names:
        if name not in trackers():
            raise RecipeError(f"{key} = {name!r}: allowed are {', '.join(trackers())}")
    if len(set(names)) < len(names):
        raise RecipeError(f"{key} = {list(names)}: each tracker may be named once")
    return list(names)


def installed(names: Sequence[str], key: str = "track") -> None:
    """RecipeError for a tracker whose package is not there."""
    for name in known(names, key):
        if importlib.util.find_spec(trackers()[name].package) is None:
            raise RecipeError(f"{key} = {name!r} needs the package {trackers()[name].package}; pip install "
                              f"'fedlm[{name}]'")

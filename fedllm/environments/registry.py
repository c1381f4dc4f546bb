"""Environments are found by walking this folder: the file's stem is the name, and there is no list to edit."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from fedllm.core.errors import RecipeError
from fedllm.environments.env import Bounded, Scene
from fedllm.environments.rules import Rules
from fedllm.environments.words import WordScene

ROOM = ("env", "registry", "words", "toolbox", "reading", "problems", "rules", "served", "serving", "tape")
PREFIX = "env:"
"""Of a source that is an environment: `data.source: env:gridworld`."""
MAX_STEPS = 100


@functools.cache
def scenes() -> dict[str, type[Scene]]:
    """Every environment by name."""
    import fedllm.environments as room

    found: dict[str, type[Scene]] = {}
    for info in pkgutil.iter_modules(room.__path__):
        if info.name not in ROOM:
            module = importlib.import_module(f"{room.__name__}.{info.name}")
            own = [c for _, c in inspect.getmembers(module, inspect.isclass)
                   if issubclass(c, Scene) and c.__module__ == module.__name__]
            if len(own) != 1:
                raise RecipeError(f"{module.__name__} must hold just one Scene; it holds {[c.__name__ for c in own]}")
            found[info.name] = own[0]
    return found


def make_scene(name: str, knobs: Mapping[str, Any]) -> Scene:
    """An environment's parameters; an unknown name or knob is refused with the nearest one."""
    if name not in scenes():
        near = difflib.get_close_matches(name, scenes(), n=1)
        raise RecipeError(f"data.source = '{PREFIX}{name}' is unknown{f'; did you mean {near[0]!r}?' if near else ''} "
                          f"Allowed: {', '.join(PREFIX + n for n in scenes())}")
    return scenes()[name].make(knobs, "data.environment")


def speaks(name: str) -> bool:
    """Whether this environment is one in words; RecipeError for one that is not there."""
    return isinstance(make_scene(name, {}), WordScene)


def tools(name: str) -> bool:
    """Whether this environment's lines call tools."""
    kind = type(make_scene(name, {}))
    return issubclass(kind, WordScene) and kind.tools


def dealt(name: str, knobs: Mapping[str, Any], clients: int, max_steps: int, seed: int, held_out: int = 0,
          **rules: Any) -> list[dict[str, Any]]:
    """One row for each client: the environment's name, all its parameters, and the `Rules` of its tools; then so many
    of environments that no client has.

    A list of values is dealt to the clients in order and over again. Without `layout`, each client has one of its own.
    RecipeError where the clients' observations or actions would differ in number, since they share a policy.
    """
    if bad := [k for k, v in knobs.items() if isinstance(v, list) and not v]:
        raise RecipeError(f"data.environment.{bad[0]} = []: allowed is a value, or a list of them to deal out")
    held = Rules.make(rules).told()
    if held and not tools(name):
        key, value = next(iter(held.items()))
        raise RecipeError(f"data.environment.{key} = {value}: '{PREFIX}{name}' has no tools; leave it out")
    rows, sizes = [], {}
    for i in range(clients + held_out):
        mine = {k: v[i % len(v)] if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in knobs.items()}
        scene = make_scene(name, {"layout": seed * clients + i, **mine})
        sizes.setdefault((scene.size, scene.actions), i)
        rows.append({"environment": name, "max_steps": max_steps, **held,
                     **{f.name: getattr(scene, f.name) for f in fields(scene)}})  # type: ignore[arg-type]
    if len(sizes) > 1:
        (a, i), (b, j) = list(sizes.items())[:2]
        raise RecipeError(f"data.environment: client {i} has {a[0]} observations and {a[1]} actions, client {j} {b[0]} "
                          f"and {b[1]}; allowed are equal numbers for all, since they share one policy")
    return rows


def bounded(row: Mapping[str, Any], rng: np.random.Generator) -> Bounded:
    """The environment of a row."""
    knobs = {k: v for k, v in row.items() if k not in ("environment", "max_steps", *Rules.names())}
    rules = Rules.make({k: row[k] for k in Rules.names() if k in row})
    return Bounded(make_scene(row["environment"], knobs), int(row["max_steps"]), rng, rules)


def placed(rows: Sequence[Mapping[str, Any]], episodes: int, draw: np.random.Generator
           ) -> tuple[list[Bounded], list[int]]:
    """So many episodes in the environment of each row: where they take place, and their seeds."""
    seeds = draw.integers(2**31, size=len(rows) * episodes).tolist()
    return [bounded(row, draw) for row in rows for _ in range(episodes)], seeds

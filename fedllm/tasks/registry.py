"""Tasks are found by walking this folder: the file's stem is the task's id, and there is no list to edit."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

from fedllm.core.errors import RecipeError
from fedllm.tasks.row import nearest
from fedllm.tasks.task import Metric, Task


@functools.cache
def tasks() -> dict[str, Task]:
    """Every task by its id."""
    import fedllm.tasks as room

    found = {}
    for info in pkgutil.iter_modules(room.__path__):
        if info.name == "registry":
            continue
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        kinds = [c for _, c in inspect.getmembers(module, inspect.isclass)
                 if c.__module__ == module.__name__ and issubclass(c, Task) and c is not Task]
        if kinds:
            found[info.name] = kinds[0]()
    return found


def task_of(name: str) -> Task:
    """The task in the file `<name>.py`; an unknown name is refused with the nearest one."""
    if name not in tasks():
        raise RecipeError(f"data.task = {name!r} is unknown{nearest(name, tasks()) or '.'} Allowed: "
                          f"{', '.join(tasks())}")
    return tasks()[name]


@functools.cache
def metrics() -> dict[str, Metric]:
    """Every metric of every task by name, those first that tell most of their task; `loss` is the last."""
    ranked = sorted((at, task, name, metric) for task, made in tasks().items()
                    for at, (name, metric) in enumerate(made.metrics.items()))
    return {name: metric for _, _, name, metric in ranked} | {"loss": Metric("min", share=False)}

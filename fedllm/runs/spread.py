"""Spreads a run's clients over a Ray cluster, or each client over processes, for as long as the run takes."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedllm.data.federation import Federation
from fedllm.engines.world import World
from fedllm.models.model import Model
from fedllm.runs.build import Parts, make_recipe_space, make_world, recipe_model
from fedllm.runs.plugins import plugged
from fedllm.runs.recipe import Recipe


@contextlib.contextmanager
def spread(parts: Parts) -> Iterator[None]:
    """While the block runs, a recipe with `engine: {kind: ray}` has its workers, and one with `engine.processes` its
    processes; any other is left as it is."""
    spec = parts.recipe.engine
    if spec.processes > 1 and parts.engine is None:
        with together(parts):
            yield
        return
    if spec.kind != "ray" or parts.engine is not None:
        yield
        return
    from fedllm.engines.ray import Worker
    from fedllm.engines.ray_pool import Pool

    pool = Pool(Worker, spec.workers, spec.threads, spec.address)
    parts.engine = over(pool, parts)
    try:
        yield
    finally:
        pool.close()


@contextlib.contextmanager
def together(parts: Parts) -> Iterator[None]:
    """While the block runs, several processes train each client."""
    from fedllm.local.group import Group  # torch.distributed is slow to load

    world, recipe = parts.world, parts.recipe
    make = functools.partial(twin, recipe, world.model.task, world.model.labels, world.model.device.type)
    group = Group(make, world.model, recipe.engine.processes, recipe.engine.threads)
    world.limits = replace(world.limits, group=group)
    try:
        yield
    finally:
        group.close()
        world.limits = replace(world.limits, group=None)


def twin(recipe: Recipe, task: str, labels: Sequence[str], device: str, rank: int) -> Model:
    """The recipe's model once more, in a process that trains it together with others; of several cards each has one."""
    plugged([(p.file, p.sha256) for p in recipe.plugins])
    space, _ = make_recipe_space(recipe)
    return recipe_model(recipe, space, task, labels, f"cuda:{rank}" if device == "cuda" else device)


def over(pool: Any, parts: Parts) -> Callable[..., Any]:
    """What makes this run's engines over a pool of workers."""
    from fedllm.engines.ray import Opening, Ray

    world = functools.partial(worker_world, parts.recipe, parts.world.federation)
    return functools.partial(Ray, pool=pool, opening=Opening(uuid.uuid4().hex, world))


def worker_world(recipe: Recipe, federation: Federation) -> World:
    """What a worker stands on: its own copy of the model. Rows come with the run, so that files need not lie there."""
    torch.set_num_threads(recipe.engine.threads)
    plugged([(p.file, p.sha256) for p in recipe.plugins])
    return make_world(recipe, federation)

"""Spreads a run's clients over a Ray cluster, for as long as the run takes."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fedllm.data.federation import Federation
from fedllm.engines.world import World
from fedllm.runs.build import Parts, make_world
from fedllm.runs.plugins import plugged
from fedllm.runs.recipe import Recipe


@contextlib.contextmanager
def spread(parts: Parts) -> Iterator[None]:
    """While the block runs, a recipe with `engine: {kind: ray}` has its workers; any other is left as it is."""
    spec = parts.recipe.engine
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

"""Runs without rows: a policy or a decision transformer acts in environments, or a language model in those in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Method
from fedllm.data.scenes import scene_rows
from fedllm.engines.world import World
from fedllm.environments.registry import PREFIX, bounded, make_scene, placed, speaks
from fedllm.local.logs import RANDOM, habit, lived
from fedllm.methods._acting import figures
from fedllm.methods.registry import method_class, modules
from fedllm.models.decider import DECIDER, make_decider
from fedllm.models.model import Model
from fedllm.models.policy import POLICY, make_policy
from fedllm.runs.recipe import Recipe
from fedllm.spaces.space import Space

LEARN = {POLICY: "environments", DECIDER: "logs"}
"""What each network that acts learns from (`Method.learns_from`)."""


def acts(recipe: Recipe) -> bool:
    """Whether a small network acts in environments; RecipeError where the model and the data disagree about it."""
    m, here = recipe.model, recipe.data.acts
    policy = m.name in LEARN
    wordless = here and not policy and not speaks(str(recipe.data.source).removeprefix(PREFIX))
    if policy > here or (m.hidden and m.name != POLICY) or wordless:
        raise RecipeError(f"model.name = {m.name!r}, model.hidden = {m.hidden} and data.source = "
                          f"{recipe.data.source!r} do not fit together: an environment (env:NAME) is acted in by "
                          "model.name = 'policy' (which alone has hidden layers) or 'decider', and, if it is one in "
                          "words, by a language model; rows by neither policy nor decider")
    return policy


def policy_of(recipe: Recipe, space: Space, device: str) -> Model:
    """The recipe's policy or decision transformer, as wide as its environments ask for."""
    row = scene_rows(str(recipe.data.source), recipe.data.environment, recipe.seed)[0]
    scene = bounded(row, np.random.default_rng(0)).scene
    m = recipe.model
    if m.name == DECIDER:
        return make_decider(scene.size, scene.actions, len(scene.cues()), m.width, m.depth, space, seed=recipe.seed,
                            dtype=m.dtype, device=device)
    return make_policy(scene.size, scene.actions, m.hidden, space, seed=recipe.seed, dtype=m.dtype, device=device)


def check_acting(recipe: Recipe, method: Method) -> None:
    """CompositionError for a method, or a baseline, that learns from rows where there are none."""
    if not recipe.data.acts:
        if method.learns_from == "words":
            raise CompositionError(f"method '{recipe.method.name}' acts in environments in words and data.source = "
                                   f"{recipe.data.source!r} holds rows, so they do not fit together; 'env:desk' works")
        return
    wants = LEARN.get(recipe.model.name, "words")
    if method.learns_from != wants:
        able = [name for name in modules() if method_class(name).learns_from == wants]
        raise CompositionError(f"method '{recipe.method.name}' learns from {method.learns_from}, data.source = "
                               f"{recipe.data.source!r} is an environment and model.name = {recipe.model.name!r}, so "
                               f"they do not fit together; allowed are {', '.join(able) or 'none'}")
    known = habits_of(recipe)
    if any(name not in known for name in recipe.evaluate.baselines):
        raise CompositionError(f"evaluate.baselines = {recipe.evaluate.baselines} learn from rows, or are rules of "
                               f"other data, and data.source = {recipe.data.source!r} is an environment; allowed are "
                               f"{', '.join(known)} (method.share = 'nothing' is fed_marl's own)")


def habits_of(recipe: Recipe) -> tuple[str, ...]:
    """Ways of acting in the recipe's environment for which nothing is learned."""
    return (RANDOM, *make_scene(str(recipe.data.source).removeprefix(PREFIX), {}).habits)


def by_habit(name: str, world: World, episodes: int) -> dict[str, Any]:
    """A habit's evaluation, on the episodes on which clients and the server are tested."""
    def one(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        envs, seeds = placed(rows, episodes, np.random.default_rng(0))
        done = [lived(env, seed, habit(env.scene, name), np.random.default_rng([seed, 1]))
                for env, seed in zip(envs, seeds, strict=True)]
        return {"n": len(done), **figures(done)}

    return {"global": one(world.rows(SERVER, "test")),
            "clients": {c: one(world.rows(c, "test")) for c in world.federation.clients}}

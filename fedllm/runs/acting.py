"""Runs without rows and without a language model: a policy that acts in environments."""

from __future__ import annotations

import numpy as np

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Method
from fedllm.data.scenes import scene_rows
from fedllm.environments.registry import bounded
from fedllm.models.model import Model
from fedllm.models.policy import POLICY, make_policy
from fedllm.runs.recipe import Recipe
from fedllm.spaces.space import Space


def acts(recipe: Recipe) -> bool:
    """Whether clients act in environments; RecipeError where the model and the data disagree about it."""
    m, here = recipe.model, recipe.data.acts
    if (m.name == POLICY) != here or (m.hidden and not here):
        raise RecipeError(f"model.name = {m.name!r}, model.hidden = {m.hidden} and data.source = "
                          f"{recipe.data.source!r} do not fit together: an environment (env:NAME) is acted in by "
                          "model.name = 'policy', and by nothing else")
    return here


def policy_of(recipe: Recipe, space: Space, device: str) -> Model:
    """The recipe's policy, as wide as its environments ask for."""
    row = scene_rows(str(recipe.data.source), recipe.data.environment, recipe.seed)[0]
    scene = bounded(row, np.random.default_rng(0)).scene
    return make_policy(scene.size, scene.actions, recipe.model.hidden, space, seed=recipe.seed,
                       dtype=recipe.model.dtype, device=device)


def check_acting(recipe: Recipe, method: Method) -> None:
    """CompositionError for a method, or a baseline, that learns from rows where there are none."""
    if not recipe.data.acts:
        return
    if method.learns_from != "environments":
        raise CompositionError(f"method '{recipe.method.name}' learns from rows and data.source = "
                               f"{recipe.data.source!r} is an environment, so they do not fit together; fed_marl works")
    if recipe.evaluate.baselines:
        raise CompositionError(f"evaluate.baselines = {recipe.evaluate.baselines} learn from rows and data.source = "
                               f"{recipe.data.source!r} is an environment; leave them out (method.share = 'nothing' is "
                               "fed_marl's own)")

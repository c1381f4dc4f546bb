"""Runs without rows: a small policy that acts in environments, or a language model in those that are in words."""

from __future__ import annotations

import numpy as np

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Method
from fedllm.data.scenes import scene_rows
from fedllm.environments.registry import PREFIX, bounded, speaks
from fedllm.methods.registry import method_class, modules
from fedllm.models.model import Model
from fedllm.models.policy import POLICY, make_policy
from fedllm.runs.recipe import Recipe
from fedllm.spaces.space import Space


def acts(recipe: Recipe) -> bool:
    """Whether a small policy acts in environments; RecipeError where the model and the data disagree about it."""
    m, here = recipe.model, recipe.data.acts
    policy = m.name == POLICY
    wordless = here and not policy and not speaks(str(recipe.data.source).removeprefix(PREFIX))
    if policy > here or (m.hidden and not policy) or wordless:
        raise RecipeError(f"model.name = {m.name!r}, model.hidden = {m.hidden} and data.source = "
                          f"{recipe.data.source!r} do not fit together: an environment (env:NAME) is acted in by "
                          "model.name = 'policy', and, if it is one in words, by a language model; rows by no policy")
    return policy


def policy_of(recipe: Recipe, space: Space, device: str) -> Model:
    """The recipe's policy, as wide as its environments ask for."""
    row = scene_rows(str(recipe.data.source), recipe.data.environment, recipe.seed)[0]
    scene = bounded(row, np.random.default_rng(0)).scene
    return make_policy(scene.size, scene.actions, recipe.model.hidden, space, seed=recipe.seed,
                       dtype=recipe.model.dtype, device=device)


def check_acting(recipe: Recipe, method: Method) -> None:
    """CompositionError for a method, or a baseline, that learns from rows where there are none."""
    if not recipe.data.acts:
        if method.learns_from == "words":
            raise CompositionError(f"method '{recipe.method.name}' acts in environments in words and data.source = "
                                   f"{recipe.data.source!r} holds rows, so they do not fit together; 'env:desk' works")
        return
    wants = "environments" if recipe.model.name == POLICY else "words"
    if method.learns_from != wants:
        able = [name for name in modules() if method_class(name).learns_from == wants]
        raise CompositionError(f"method '{recipe.method.name}' learns from {method.learns_from}, data.source = "
                               f"{recipe.data.source!r} is an environment and model.name = {recipe.model.name!r}, so "
                               f"they do not fit together; allowed are {', '.join(able) or 'none'}")
    if recipe.evaluate.baselines:
        raise CompositionError(f"evaluate.baselines = {recipe.evaluate.baselines} learn from rows and data.source = "
                               f"{recipe.data.source!r} is an environment; leave them out (method.share = 'nothing' is "
                               "fed_marl's own)")

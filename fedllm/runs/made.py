"""Runs of networks that are built and not loaded, and the rules without a model that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm.core.client import SERVER
from fedllm.core.errors import RecipeError
from fedllm.engines.world import World
from fedllm.models.made import NETS, Made, check_made, make_net
from fedllm.models.model import Model
from fedllm.runs.recipe import Recipe
from fedllm.spaces.space import Space
from fedllm.tasks.registry import task_of


def made_of(recipe: Recipe, space: Space, task: str, labels: Sequence[str], device: str) -> Model | None:
    """The recipe's network, as its rows ask for; None where its model is loaded."""
    m, windows = recipe.model, recipe.data.windows
    check_made(m.name, task)
    if m.name not in NETS:
        return None
    sizes = None if windows is None else {"past": windows.past, "horizon": windows.horizon, "target": windows.at,
                                          "variables": len(windows.of)}
    by = Made(m.width, m.depth, tuple(labels), sizes, (m.codes[0], m.codes[1]), m.prompts, m.branch, m.picture)
    return make_net(m.name, by, space, seed=recipe.seed, dtype=m.dtype, device=device)


def check_rules(recipe: Recipe) -> None:
    """RecipeError for a rule that the data's task does not have; those of environments `check_acting` looks at."""
    if recipe.data.acts:
        return
    known = task_of(recipe.data.task).rules
    odd = [n for n in rules_in(recipe.evaluate.baselines) if n not in known]
    if odd:
        raise RecipeError(f"evaluate.baselines: {odd[0]!r} is no rule of data.task = {recipe.data.task!r}; allowed are "
                          f"{', '.join(('local_only', 'centralized', *known))}")


def rules_in(names: Sequence[str]) -> list[str]:
    """Those of these baselines that are rules, and no methods."""
    return [n for n in names if n not in ("local_only", "centralized")]


def run_rule(name: str, world: World) -> dict[str, Any]:
    """A rule's evaluation: on the global test by what all clients hold, on a client's own by what it holds."""
    rules, labels = world.model.rules, world.federation.labels
    test = world.encoded(SERVER, "test")
    out: dict[str, Any] = {"global": rules.by_rule(name, world.encoded(SERVER, "train"), test, labels) if test else
                           None, "clients": {}}
    for client in world.federation.clients:
        if own := world.encoded(client, "test"):
            out["clients"][client] = rules.by_rule(name, world.encoded(client, "train"), own, labels)
    return out

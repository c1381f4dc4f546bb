"""How a site takes part in a run: the coordinator's recipe over the site's own rows, if its settings allow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.client import ClientInfo, Profile
from fedllm.core.errors import RecipeError
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.data.load import HOLD_BACK_FROM, _held_back, load_federation
from fedllm.engines.far.reasons import Refused
from fedllm.engines.far.site import SiteRun
from fedllm.engines.far.sites import Head
from fedllm.engines.world import World
from fedllm.federation.admission import admitted, same_versions
from fedllm.federation.guard import SiteGuard
from fedllm.federation.identity import TOLD, identity_of, keep_identity
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.memory import DiskMemory
from fedllm.federation.settings import SiteSettings
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.runs.build import bound, compose, make_layers, make_recipe_space, recipe_model
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import Recipe
from fedllm.runs.store import private_folder


def open_run(head: Head, site: str, settings: SiteSettings) -> tuple[SiteRun, dict[str, Any]]:
    """The run that a coordinator's message describes, if this site takes part in it; loads the model.

    Raises FedLLMError with the reason when the site's settings forbid it.
    """
    same_versions(head["versions"], settings)
    run, sites = str(head["run"]), sorted({site, *map(str, head["sites"])})
    if not run.replace("-", "").isalnum():
        raise Refused("message", f"run = {run!r} is no run's name")
    recipe = admitted(head["recipe"], settings)
    method = make_method(recipe.method.name, **recipe.method.knobs)
    layers, _ = make_layers(recipe)
    compose(method, layers)
    if why := settings.forbids(recipe, layers):
        raise why
    world = _own_world(recipe, site, sites, settings)
    info, mine = world.infos()[0], world.federation.clients[site]
    if settings.most_epsilon is not None and settings.most_delta * info.n >= 1:
        raise Refused("noise", f"most_delta = {settings.most_delta:g} may expose one of {info.n} rows; it must be less "
                               "than one over their number")
    method.check(world.model)
    layers = bound(layers, recipe, dict.fromkeys(sites, info.n), world.local)  # nobody tells a site the others' rows
    folder = private_folder(Path(settings.store) / run)
    found = identity_of(world.model, [*mine.train, *mine.test])
    keep_identity(folder, found)
    memory = DiskMemory(folder, head["at"], 2 * recipe.record.checkpoint_every)
    guard = SiteGuard(settings, SiteLedger(Path(settings.store)), run, settings.most_epsilon is not None)
    said = {"n": info.n, "profile": settings.profile, "task": world.federation.task,
            "labels": list(world.federation.labels), **{name: found[name] for name in TOLD}}
    return SiteRun((method, *layers), world, ClientInfo(site, info.n, info.profile), memory, guard, sites), said


def _own_world(recipe: Recipe, site: str, sites: Sequence[str], settings: SiteSettings) -> World:
    """This site's rows and the recipe's model, if the work of a round is no more than it allows; loads the model."""
    federation, local = _own_rows(recipe, site, settings), LocalSpec.make(recipe.local, "local")
    if (steps := local.count(len(federation.clients[site].train))) > settings.most_steps:
        raise Refused("work", f"{steps} local steps a round, most_steps = {settings.most_steps}",
                      allowed=settings.most_steps)
    space, _ = make_recipe_space(recipe)
    e = recipe.evaluate
    model = recipe_model(recipe, space, federation.task, federation.labels, settings.device)
    profile = site_profile(recipe, site, sites, settings.profile)
    limits = Limits(batch_tokens=recipe.engine.batch_tokens)
    return World(model, federation, local, recipe.seed, {site: profile}, limits, e.exact_match, e.max_new_tokens,
                 recipe.data.completion_only, recipe.rounds)


def site_profile(recipe: Recipe, site: str, sites: Sequence[str], declared: Mapping[str, Any]) -> Profile:
    """What the recipe says of this site, overruled by what the site declares of itself."""
    recipe = recipe.model_copy(update={"clients": recipe.clients.model_copy(
        update={"profiles": {k: v for k, v in recipe.clients.profiles.items() if k in sites}})})
    profiles = make_profiles(recipe, list(sites))
    try:
        return replace(profiles[site], **declared)
    except TypeError as error:
        raise RecipeError(f"profile of site '{site}': {error}") from None


def _own_rows(recipe: Recipe, site: str, settings: SiteSettings) -> Federation:
    """This site's rows as one client, held back for its test as the same client's would be in a simulation."""
    if not Path(settings.data).exists():
        raise Refused("no_data", settings.data)
    if recipe.data.task == "classification" and not recipe.data.labels:
        raise Refused("recipe", "data.labels is empty; in a real federation the recipe names the labels, since no site "
                                "knows the others'")
    found = load_federation(recipe.data.model_copy(update={"client_test": 0.0}), recipe.seed)
    rows: list[Row] = found.pooled()
    fraction = recipe.data.client_test if len(rows) >= HOLD_BACK_FROM else 0.0
    test, train = _held_back(np.arange(len(rows)), fraction, numpy_stream(recipe.seed, "data.client_test", site))
    return replace(found, clients={site: Shard([rows[i] for i in train], [rows[i] for i in test])}, test=())

"""How a site takes part in a run: the coordinator's recipe over the site's own rows, if its settings allow it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.client import ClientInfo, Profile
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.data.load import HOLD_BACK_FROM, _held_back, load_federation
from fedllm.engines.far.site import SiteRun
from fedllm.engines.far.sites import Head
from fedllm.engines.world import World
from fedllm.federation.memory import DiskMemory
from fedllm.federation.public import site_rows
from fedllm.federation.settings import SiteSettings
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS, make_method
from fedllm.models.endpoint import Endpoint
from fedllm.runs.build import compose, make_layers, make_recipe_space, need_public, recipe_model, versions
from fedllm.runs.models import check_held, check_names, need_named, shelves
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import NamedModel, Recipe, load_recipe
from fedllm.tasks.registry import task_of


def open_run(head: Head, site: str, settings: SiteSettings) -> tuple[SiteRun, dict[str, Any]]:
    """The run that a coordinator's message describes, if this site takes part in it; loads the model.

    Raises FedLLMError with the reason when the site's settings forbid it.
    """
    _same_versions(head["versions"], settings)
    recipe = _recipe(head["recipe"], settings)
    method = make_method(recipe.method.name, **recipe.method.knobs)
    layers, _ = make_layers(recipe, named=settings.model is not None)
    compose(method, layers)
    if why := settings.forbids(recipe, layers):
        raise RecipeError(why)
    federation = replace(_own_rows(recipe, site, settings), public=site_rows(head, recipe, settings))
    if "clients" in method.public_at():
        need_public(recipe, method, len(federation.public))
    profile = site_profile(recipe, site, head["sites"], declared(settings, recipe))
    world = _world(recipe, method, federation, {site: profile}, settings)
    info = world.infos()[0]
    run = str(head["run"])
    if not run.replace("-", "").isalnum():
        raise RecipeError(f"run = {run!r} is no run's name")
    memory = DiskMemory(Path(settings.store) / run, head["at"], 2 * recipe.record.checkpoint_every)
    said = {"n": info.n, "profile": declared(settings, recipe), "task": federation.task,
            "labels": list(federation.labels)}
    return SiteRun((method, *layers), world, ClientInfo(site, info.n, info.profile), memory, settings.may), said


def declared(settings: SiteSettings, recipe: Recipe) -> dict[str, Any]:
    """What this site says of itself; of a folder that its model lies in the last part of the path alone."""
    if settings.model is None:
        return settings.profile
    here = settings.model not in recipe.models and Path(settings.model).expanduser().is_dir()
    return {**settings.profile, "model": Path(settings.model).expanduser().resolve().name if here else settings.model}


def _world(recipe: Recipe, method: Any, federation: Federation, profiles: Mapping[str, Profile],
           settings: SiteSettings) -> World:
    """What the client stands on: the model that it holds is loaded, and whatever the method asks for by name."""
    space, _ = make_recipe_space(recipe)
    main = functools.cache(lambda: recipe_model(recipe, space, federation.task, federation.labels, settings.device))
    (name,) = (p.model for p in profiles.values())
    own = {} if settings.model is None or settings.model in recipe.models else {str(name): settings.model}
    check_names(recipe)
    need_named(recipe, method)
    named, held = shelves(recipe, federation.task, federation.labels, main, profiles, device=settings.device, own=own,
                          guard=functools.partial(_may_load, settings))
    for asked in method.asks_for():
        if isinstance(model := named[asked], Endpoint):
            model.reach()
    model = main() if name is None else held[name]
    if name is None:
        method.check(model)
    else:
        check_held(recipe, method, name, model)
    e = recipe.evaluate
    return World(model, federation, LocalSpec.make(recipe.local, "local"), recipe.seed, profiles,
                 Limits(batch_tokens=recipe.engine.batch_tokens), e.exact_match, e.max_new_tokens,
                 recipe.data.completion_only, recipe.rounds, None, named, held)


def _may_load(settings: SiteSettings, key: str, spec: NamedModel) -> None:
    """RecipeError for a model of the recipe that this site does not load, or put its text to."""
    if spec.endpoint is not None:
        address = str(Endpoint.make(spec.endpoint, f"{key}.endpoint").base_url)
        if why := settings.closed(f"{key}.endpoint.base_url", address):
            raise RecipeError(why)
    _path_inside(key, spec.name, settings)


def _same_versions(theirs: Mapping[str, str], settings: SiteSettings) -> None:
    mine = versions()
    for package in settings.same_packages:
        if theirs.get(package) != mine.get(package):
            raise CompositionError(f"the run asks for {package} {theirs.get(package)}, this site has installed "
                                   f"{mine.get(package)}; install the same version on both sides")


def _recipe(raw: Mapping[str, Any], settings: SiteSettings) -> Recipe:
    """The coordinator's recipe with this site's data, if it asks for nothing that is forbidden here."""
    if raw.get("plugins"):
        raise RecipeError(f"plugins = {raw['plugins']}: a site never loads code from a recipe; "
                          "install the method here as a package (entry point fedllm.methods), and name it in this "
                          "site's settings (methods)")
    data = {k: v for k, v in raw["data"].items() if k not in ("source", "test", "public", "partition", "office")}
    recipe = load_recipe({**raw, "data": {**data, "source": settings.data, "test": 0.0,
                                          "partition": {"kind": "per_file"}}})
    name = recipe.method.name
    if settings.methods is not None and name not in settings.methods:
        raise RecipeError(f"method '{name}' is not on this site's allow-list "
                          f"({', '.join(settings.methods) or 'empty'})")
    if name not in METHODS:
        raise RecipeError(f"method '{name}' is not installed here, and this site runs installed code only")
    if name not in METHODS.ours and settings.methods is None:
        raise RecipeError(f"method '{name}' comes from {METHODS.whose(name)} and not from fedllm; name it in this "
                          f"site's settings (methods: [{name}]) if it may run here")
    if recipe.model.trust_remote_code and not settings.trust_remote_code:
        raise RecipeError("model.trust_remote_code = true is forbidden by this site (trust_remote_code = false)")
    for key, value in (("model.name", recipe.model.name), ("space.start_from", recipe.space.knobs.get("start_from"))):
        _path_inside(key, value, settings)
    return recipe


def _path_inside(key: str, value: Any, settings: SiteSettings) -> None:
    """A path that a run names must lie in a folder that the site opened for it."""
    if not isinstance(value, str) or not (value.startswith(("/", ".", "~")) or Path(value).exists()):
        return
    real = Path(value).expanduser().resolve()
    if not any(real.is_relative_to(Path(folder).resolve()) for folder in settings.models):
        raise RecipeError(f"{key} = {value!r} is a path outside of the folders that this site opened "
                          f"({', '.join(settings.models) or 'none'}); use a Hub id, or `fedllm join --models FOLDER`")


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
        raise DataError(f"this site's data ({settings.data}) does not exist")
    if "labels" in task_of(recipe.data.task).takes and not recipe.data.labels:
        raise RecipeError("data.labels is empty; in a real federation the recipe names the labels, since no site "
                          "knows the others'")
    found = load_federation(recipe.data.model_copy(update={"client_test": 0.0}), recipe.seed)
    rows: list[Row] = found.pooled()
    fraction = recipe.data.client_test if len(rows) >= HOLD_BACK_FROM else 0.0
    test, train = _held_back(np.arange(len(rows)), fraction, numpy_stream(recipe.seed, "data.client_test", site))
    return replace(found, clients={site: Shard([rows[i] for i in train], [rows[i] for i in test])}, test=())

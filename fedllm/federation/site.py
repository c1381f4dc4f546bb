"""How a site takes part in a run: the coordinator's recipe over the site's own rows, if its settings allow it."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.core.client import ClientInfo, Profile
from fedllm.core.errors import RecipeError
from fedllm.data.federation import Federation, Shard
from fedllm.data.load import load_federation
from fedllm.engines.far.line import Head
from fedllm.engines.far.reasons import Refused
from fedllm.engines.far.site import SiteRun
from fedllm.engines.world import World
from fedllm.federation.admission import admitted, may_load, same_versions
from fedllm.federation.gated import gated
from fedllm.federation.guard import SiteGuard
from fedllm.federation.identity import TOLD, identity_of, keep_identity
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.memory import DiskMemory
from fedllm.federation.network import close
from fedllm.federation.public import site_rows
from fedllm.federation.settings import SiteSettings
from fedllm.local.groupable import check_group
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Endpoint
from fedllm.models.load import lasting
from fedllm.models.model import Model
from fedllm.runs.acting import check_acting
from fedllm.runs.build import bound, make_layers, make_recipe_space, recipe_model
from fedllm.runs.fits import compose, need_public
from fedllm.runs.models import check_held, check_names, need_named, shelves
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import Recipe
from fedllm.runs.spread import twin
from fedllm.runs.store import private_folder
from fedllm.runs.training import check_training
from fedllm.runs.used import NOTE
from fedllm.tasks.registry import task_of


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
    layers, _ = make_layers(recipe, named=True)  # another site may hold a model of its own
    layers = gated(method, layers, settings.gate, settings.gate_detector)
    compose(method, layers)
    if why := settings.forbids(recipe, layers, method.noise_of_counts):
        raise why
    check_acting(recipe, method)
    federation = replace(_own_rows(recipe, site, settings), public=site_rows(head, recipe, settings))
    if "clients" in method.public_at():
        need_public(recipe, method, len(federation.public))
    profile = site_profile(recipe, site, sites, declared(settings, recipe))
    world = _world(recipe, method, federation, {site: profile}, settings)
    info, mine = world.infos()[0], federation.clients[site]
    if settings.most_epsilon is not None and settings.most_delta * info.n >= 1:
        raise Refused("noise", f"most_delta = {settings.most_delta:g} may expose one of {info.n} rows; it must be less "
                               "than one over their number")
    layers = bound(layers, recipe, dict.fromkeys(sites, info.n), world.local, guessed=True)  # nobody tells a site
    folder = private_folder(Path(settings.store) / run)
    found = identity_of(world.model, None if method.rows_change else [*mine.train, *mine.test])
    keep_identity(folder, found)
    memory = DiskMemory(folder, head["at"], 2 * recipe.record.checkpoint_every)
    guard = SiteGuard(settings, SiteLedger(Path(settings.store)), run, settings.most_epsilon is not None)
    said = {"n": info.n, "profile": declared(settings, recipe), "task": federation.task,
            "labels": list(federation.labels), **{name: found[name] for name in TOLD}}
    known = [*sites, *(f"note/{NOTE}{name}" for name in (profile.model, *recipe.models) if name)]
    return SiteRun((method, *layers), world, ClientInfo(site, info.n, info.profile), memory, guard, known), said


def declared(settings: SiteSettings, recipe: Recipe) -> dict[str, Any]:
    """What this site says of itself; of a folder or file that its model lies in the last part of the path alone."""
    if settings.model is None:
        return settings.profile
    found = Path(lasting(settings.model))
    here = settings.model not in recipe.models and found.is_absolute()
    return {**settings.profile, "model": found.name if here else settings.model}


def _world(recipe: Recipe, method: Any, federation: Federation, profiles: Mapping[str, Profile],
           settings: SiteSettings) -> World:
    """What the client stands on, if the work of a round is no more than this site allows: the model that it holds is
    loaded, and whatever the method asks for by name."""
    local = _local(recipe, federation, settings)
    space, _ = make_recipe_space(recipe)
    main = functools.cache(lambda: recipe_model(recipe, space, federation.task, federation.labels, settings.device))
    (name,) = (p.model for p in profiles.values())
    own = {} if settings.model is None or settings.model in recipe.models else {str(name): settings.model}
    check_names(recipe)
    need_named(recipe, method, server=False)
    named, held = shelves(recipe, federation.task, federation.labels, main, profiles, device=settings.device, own=own,
                          guard=functools.partial(may_load, settings))
    for asked in method.asks_for():
        if isinstance(model := named[asked], Endpoint):
            model.reach()
    model = main() if name is None else held[name]
    if name is None:
        method.check(model)
    else:
        check_held(recipe, method, name, model)
    check_training(model, local, method)
    e = recipe.evaluate
    limits = Limits(batch_tokens=recipe.engine.step_tokens, group=_processes(recipe, model, local, name, settings))
    return World(model, federation, local, recipe.seed, profiles, limits,
                 e.exact_match, e.max_new_tokens, recipe.data.completion_only, recipe.rounds, None, named, held,
                 metric=e.metric)


def _processes(recipe: Recipe, model: Any, local: LocalSpec, held: str | None, settings: SiteSettings) -> Any:
    """The processes that train together at this site; None: one alone does."""
    if settings.processes == 1:
        return None
    if held is not None:
        raise Refused("composition", f"processes = {settings.processes} and model = {held!r}: the processes hold the "
                                     "run's main model")
    check_group(model, settings.processes, local)
    from fedllm.local.group import Group

    make = functools.partial(_twin, settings, recipe, model.task, model.labels, model.device.type)
    return Group(make, model, settings.processes, settings.threads)


def _twin(settings: SiteSettings, *told: Any) -> Model:
    """The run's model in a process that trains with others, which reaches no more of the network than this one."""
    close(settings)
    return twin(*told)


def _local(recipe: Recipe, federation: Federation, settings: SiteSettings) -> LocalSpec:
    """How this site trains, if that is no more work than it allows."""
    local, (mine,) = LocalSpec.make(recipe.local, "local"), federation.clients.values()
    if (steps := local.count(len(mine.train))) > settings.most_steps:
        raise Refused("work", f"{steps} local steps a round, most_steps = {settings.most_steps}",
                      allowed=settings.most_steps)
    return local


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
    """This site's rows as one client, held back for its test as the same client's would be in a simulation; or its
    environment, to learn in and to be tested in, whose layout is the site's own where its settings say none."""
    if settings.acts:
        found = load_federation(recipe.data, recipe.seed)
        (row,) = found.pooled()
        mine = {**row, **({} if "layout" in settings.environment else {"layout": zlib.crc32(site.encode())})}
        return replace(found, clients={site: Shard([mine], [mine], {"environment": row["environment"]})}, test=())
    if not Path(settings.data).exists():
        raise Refused("no_data", settings.data)
    if "labels" in task_of(recipe.data.task).takes and not recipe.data.labels:
        raise Refused("recipe", "data.labels is empty; in a real federation the recipe names the labels, since no site "
                                "knows the others'")
    return replace(load_federation(recipe.data, recipe.seed, client=site), test=())

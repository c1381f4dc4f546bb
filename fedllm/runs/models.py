"""The models of a run beside its main one: by name, and by client. Each has its own tokenizer and space."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedllm.core.client import Profile
from fedllm.core.errors import CompositionError, FedLLMError, ModelError, RecipeError
from fedllm.core.method import Method
from fedllm.engines.world import World
from fedllm.methods.registry import method_class, modules
from fedllm.models.endpoint import Endpoint
from fedllm.models.gguf import is_gguf
from fedllm.models.load import OWN, load_model, speaks
from fedllm.models.model import Model, Task
from fedllm.models.sealed import Sealed, sealed
from fedllm.models.shelf import Shelf, unknown
from fedllm.runs.recipe import Recipe
from fedllm.runs.sections import Named, NamedModel
from fedllm.spaces.registry import SPACES, make_space
from fedllm.spaces.space import Space

NONE = ("any",)
"""The labels of an encoder that is there for its vectors."""
Guard = Callable[[str, NamedModel], None]
"""Raises the reason why this machine does not load or ask a model, given its key and its spec."""


def anything(key: str, spec: NamedModel) -> None:
    """The guard of a simulation: its recipe is one's own."""


def shelves(recipe: Recipe, task: Task, labels: Sequence[str], main: Callable[[], Model],
            profiles: Mapping[str, Profile], *, device: str | None = None,
            own: Mapping[str, str] = MappingProxyType({}), guard: Guard = anything) -> tuple[Shelf, Shelf]:
    """(models by name, models as clients' profiles call them); nothing is loaded before it is asked for.

    `own` are names of this machine's own folders and ids, which no recipe brought and no `guard` sees.
    """
    make = functools.partial(_made, recipe, task, labels, device)
    named = Shelf({n: functools.partial(make, guard, f"models.{n}", spec) for n, spec in recipe.models.items()})
    held: dict[str, Callable[[], Any]] = {}
    for name in {p.model for p in profiles.values()} - {None}:
        assert name is not None
        if name in own:
            held[name] = functools.partial(make, anything, f"this site's model '{name}'", NamedModel(name=own[name]))
        elif name in named:
            held[name] = functools.partial(named.__getitem__, name)
        elif name == recipe.model.name:
            held[name] = main
        else:
            held[name] = functools.partial(make, guard, f"clients.models: '{name}'", NamedModel(name=name))
    return named, Shelf(held)


def check_names(recipe: Recipe) -> None:
    """RecipeError for a model that a client is dealt and that is neither a name of `models` nor could be loaded, and
    for an endpoint that is none."""
    for name, spec in recipe.models.items():
        if spec.endpoint is not None:
            Endpoint.make(spec.endpoint, f"models.{name}.endpoint")
    dealt = {f"clients.models.{i}": n for i, n in enumerate(recipe.clients.models or ())}
    dealt |= {f"clients.profiles.{c}.model": p["model"] for c, p in recipe.clients.profiles.items() if "model" in p}
    for key, name in dealt.items():
        if not isinstance(name, str):
            raise RecipeError(f"{key} = {name!r} is not allowed; it must be a text")
        mine = name in recipe.models or name == recipe.model.name or name in OWN
        if not (mine or "/" in name or Path(name).is_dir() or is_gguf(name)):
            raise RecipeError(f"{key}: there is no {unknown(name, recipe.models)}; allowed are these, "
                              f"{', '.join((recipe.model.name, *OWN))}, a folder, a GGUF file, and a Hub id owner/name")


def check_models(recipe: Recipe, method: Method, world: World) -> None:
    """Load every model and try every endpoint; refuse models that the method cannot take, and names that it lacks."""
    need_named(recipe, method)
    for model in map(world.models.__getitem__, world.models):
        if isinstance(model, Endpoint):
            model.reach()
    method.check_named(world.model, {n: world.models[n] for n in (*method.asks_for(), *method.server_asks_for())})
    for name in sorted(world.held):
        check_held(recipe, method, name, world.held[name])


def check_servers(method: Method, main: Any, named: Shelf) -> None:
    """The same for the coordinator of a real federation, of the models that its server uses; no other is loaded."""
    for name in method.server_asks_for():
        if isinstance(model := named[name], Endpoint):
            model.reach()
    asked = (*method.asks_for(), *method.server_asks_for())
    method.check_named(main, Shelf({n: functools.partial(named.__getitem__, n) for n in asked}))


def need_named(recipe: Recipe, method: Method, server: bool = True) -> None:
    """CompositionError when the method uses a model by a name that the recipe does not have; `server`: the models that
    the server alone uses count, too."""
    for name in (*method.asks_for(), *(method.server_asks_for() if server else ())):
        if name not in recipe.models:
            raise CompositionError(f"method '{recipe.method.name}' asks for a model that the recipe does not have: "
                                   f"{unknown(name, recipe.models)}")


def check_held(recipe: Recipe, method: Method, name: str, model: Any) -> None:
    """CompositionError when clients cannot hold this model under this method."""
    if name == recipe.model.name:
        return method.check(model)
    ours = isinstance(model, Model | Sealed)
    if ours and (model.task != recipe.data.task or model.labels == NONE):
        kind = "its vectors" if model.labels == NONE else model.task
        raise ModelError(f"clients cannot hold '{name}': it is there for {kind}, and data.task is '{recipe.data.task}'")
    if method.mixes != "text" and (not ours or not method.mixes):
        what = f"another model than model.name = '{recipe.model.name}'" if ours else "an endpoint, which only says text"
        able = [n for n in modules() if (mixes := method_class(n).mixes) and (ours or mixes == "text")]
        raise CompositionError(f"method '{recipe.method.name}' cannot join clients that hold '{name}', {what}; methods "
                               f"that can: {', '.join(able)}")
    if ours:
        method.check(model)


def _made(recipe: Recipe, task: Task, labels: Sequence[str], device: str | None, guard: Guard, key: str,
          spec: NamedModel) -> Any:
    """One model; errors begin with the key that names it."""
    guard(key, spec)
    if spec.endpoint is not None:
        return Endpoint.make(spec.endpoint, f"{key}.endpoint")
    try:
        made = _loaded(recipe, spec, task, labels, device, key)
    except FedLLMError as error:
        raise type(error)(f"{key}: {error}") from None
    return sealed(made) if spec.sealed else made


def _loaded(recipe: Recipe, spec: NamedModel, task: Task, labels: Sequence[str], device: str | None, key: str) -> Model:
    name, m = str(spec.name), recipe.model
    wanted = spec.task or task
    if wanted == "generation" and not speaks(name):
        if spec.task or not key.startswith("models."):
            raise ModelError(f"'{name}' is an encoder, which says nothing, and the task is 'generation'")
        wanted = "embedding"  # beside a language model an encoder is there for its vectors
    own = {k: v for k, v in recipe.space.model_dump().items() if k != "start_from"}  # which is the main model's
    space, start = space_of(spec.space or Named(**({"name": "head"} if wanted == "embedding" else own)))
    kind: Task = "classification" if wanted == "embedding" else wanted
    known = NONE if wanted == "embedding" else labels if wanted == task else ()
    made = load_model(name, kind, space, labels=known, seed=recipe.seed,
                      dtype=spec.dtype or m.dtype, pooling=spec.pooling or m.pooling, fast_kernels=m.fast_kernels,
                      device=device or m.device, trust_remote_code=m.trust_remote_code,
                      quantize=spec.quantize)
    if start is not None:
        from fedllm.models.reread import begin_with

        begin_with(start, made)
    return made


def space_of(said: Named) -> tuple[Space, str | None]:
    """A space by its name and knobs, and the folder of the adapter that it starts from (`start_from`), if any."""
    knobs, start = said.knobs, None
    options = SPACES.find(said.name, "space.name").knobs().get("start_from", {}).get("options") or ()
    if "start_from" in knobs and knobs["start_from"] not in options:
        from fedllm.models.peft_io import knobs_of

        start = str(knobs.pop("start_from"))
        knobs = {**knobs_of(start, said.name), **knobs}
    return make_space(said.name, **knobs), start

"""From a checked recipe to the parts of a run: federation, model, method, layers, engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from fedllm.core.client import Fleet
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.layer import Facts, Layer
from fedllm.core.method import Method
from fedllm.core.record import Record
from fedllm.core.select import Selector
from fedllm.data.federation import Federation
from fedllm.data.load import load_federation
from fedllm.engines import ENGINES, Vectorized
from fedllm.engines.world import World
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model, load_tokenizer
from fedllm.models.made import NAMES
from fedllm.models.model import Model
from fedllm.runs.acting import acts, check_acting, policy_of
from fedllm.runs.best import check_best
from fedllm.runs.fits import (
    check_cohort,
    check_deadlines,
    check_declared,
    check_ranks,
    cohort_size,
    compose,
    need_public,
    no_stages,
    overrides,
)
from fedllm.runs.layers import make_layer
from fedllm.runs.made import check_rules, made_of
from fedllm.runs.metrics import check_metrics
from fedllm.runs.models import check_models, check_names, shelves, space_of
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import Recipe
from fedllm.runs.training import check_processes, check_training
from fedllm.runs.used import usage_of
from fedllm.selectors.registry import make_selector
from fedllm.selectors.uniform import Uniform
from fedllm.spaces.registry import make_space
from fedllm.spaces.space import Space
from fedllm.tasks.answers import judges_of
from fedllm.trackers.registry import installed
from fedllm.wire.edge_energy import EdgeEnergy

T = TypeVar("T")
FAR = ("flare", "flower", "academy")
"""Engines whose clients are other organisations."""


@dataclass
class Parts:
    """What a run is made of, ready to go."""

    recipe: Recipe
    world: World
    method: Method
    layers: list[Layer]
    """From the method down to the wire; at the end a selector that hears of clients, and a meter."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Clients of the data that take no part, and why."""
    selector: Selector = field(default_factory=Uniform)
    engine: Callable[..., Any] | None = None
    """Who answers, where it is not the recipe's engine: the sites of a real federation."""

    def engine_over(self, stack: Sequence[Any], record: Record, **options: Any) -> Any:
        """The run's engine with this method and these layers."""
        kind = self.engine or ENGINES.get(self.recipe.engine.kind, Vectorized)  # what each worker of ray runs
        return kind(stack, self.world, record, loopback=self.recipe.engine.loopback, **options)


def build(recipe: Recipe) -> Parts:
    """Make every part; what does not fit is refused here, before any work is done."""
    no_stages(recipe)
    if recipe.engine.kind in FAR:
        raise RecipeError(f"engine.kind = {recipe.engine.kind!r} runs between organisations: start it with "
                          "`fedllm serve`. In a simulation allowed are in_process, vectorized, ray")
    _take_threads(recipe.engine.threads)
    method = by_key("method", lambda: make_method(recipe.method.name, **recipe.method.knobs))
    check_ranks(recipe, method)
    check_metrics(method)
    if not overrides(method, "round"):  # it answers and examines: there is nothing to go round for
        recipe = recipe.model_copy(update={"rounds": 0})
    make_recipe_space(recipe)
    check_names(recipe)
    installed(recipe.track)
    check_rules(recipe)
    judges_of(recipe.evaluate.metric)  # a function that is not there is refused before any row is read
    local = by_key("local", lambda: LocalSpec.make(recipe.local, "local"))
    layers, selector = make_layers(recipe)
    compose(method, layers)
    federation, left_out = _without_empty(load_federation(recipe.data, recipe.seed, embed=_embedder(recipe)))
    federation = with_canaries(federation, recipe)
    layers = bound(layers, recipe, {c: len(s.train) for c, s in federation.clients.items()}, local)
    ids = list(federation.clients)
    check_cohort(recipe, method, ids)
    need_public(recipe, method, len(federation.public))
    world = make_world(recipe, federation)
    check_acting(recipe, method)
    method.check(world.model)
    method.init(world.model)  # some methods find only here that the model's space does not suit them
    check_declared(recipe, method, world)
    check_deadlines(recipe, method, world)
    check_models(recipe, method, world)
    check_training(world.model, local, method, layers)
    check_processes(recipe, world.model, local, layers)
    method.check_work(local, recipe.rounds)
    tests = bool(federation.test) or (recipe.evaluate.clients and any(s.test for s in _shards(federation)))
    check_best(recipe.evaluate, tests)
    if local.packing and recipe.clients.models:
        raise CompositionError("local.packing = true and clients.models do not fit together: whether rows stay apart "
                               "is tried on the main model alone; leave one out")
    return Parts(recipe, world, method, layers, left_out, heard_by(layers, selector))


def _take_threads(wanted: int) -> None:
    """Give torch its threads; a RecipeError for so many that they would only wait for one another."""
    cores = os.cpu_count() or 1
    if wanted > (most := max(64, 4 * cores)):
        raise RecipeError(f"engine.threads = {wanted}: this machine has {cores} cores, and allowed on it are {most}")
    torch.set_num_threads(wanted)


def _shards(federation: Federation) -> Sequence[Any]:
    """The clients' rows; of streamed clients nothing is known before they are read."""
    return () if federation.streamed else list(federation.clients.values())


def make_layers(recipe: Recipe, named: bool = False) -> tuple[list[Layer], Selector]:
    """The recipe's layers and its selector, which stands below them if it hears of clients; meters come last.
    `named`: some client holds a model of which the recipe does not know."""
    layers = [by_key(f"layers.{i}", functools.partial(make_layer, n.name, n.knobs, f"layers.{i}"))
              for i, n in enumerate(recipe.layers)]
    selector = by_key("select", lambda: make_selector(recipe.select.name, recipe.select.knobs))
    meter = [*usage_of(recipe, layers, named), *energy_meter(recipe)]
    selector.check_stack([*layers, *meter])
    return [*layers, *([selector] if selector.hears else []), *meter], selector


def energy_meter(recipe: Recipe) -> list[Layer]:
    """The recipe's meter, next to the wire: what clients do for other layers is metered too."""
    spec = recipe.energy
    if spec is None:
        return []
    if spec.measure and recipe.engine.kind in ("vectorized", "ray"):
        raise RecipeError(f"energy.measure = true: the clients of engine.kind = {recipe.engine.kind!r} work at the "
                          "same time on one machine, whose counters cannot tell them apart. Allowed is engine.kind = "
                          "'in_process', or a real federation")
    first = {k: v[0] if isinstance(v, list) else v for k, v in spec.model_dump().items()}
    return [by_key("energy", lambda: EdgeEnergy.make(first, "energy"))]


def heard_by(layers: Sequence[Layer], selector: Selector) -> Selector:
    """The selector as it stands on the stack, bound to the run; one that hears nothing stands nowhere."""
    return next((x for x in layers if isinstance(x, Selector)), selector)


def with_canaries(federation: Federation, recipe: Recipe) -> Federation:
    """The federation with the canaries that the recipe plants."""
    if not recipe.data.canaries:
        return federation
    if recipe.data.task not in ("generation", "classification"):
        raise RecipeError(f"data.canaries = {recipe.data.canaries} and data.task = {recipe.data.task!r}: canaries are "
                          "rows of the tasks generation and classification")
    from fedllm.data.canaries import planted

    return planted(federation, recipe.data.canaries, recipe.data.canary_copies, recipe.seed,
                   load_tokenizer(recipe.model.name, recipe.model.trust_remote_code))


def make_world(recipe: Recipe, federation: Federation) -> World:
    """The recipe's model over these rows; loads the model."""
    space, start = make_recipe_space(recipe)
    local = by_key("local", lambda: LocalSpec.make(recipe.local, "local"))
    e = recipe.evaluate
    model = recipe_model(recipe, space, federation.task, federation.labels)
    if start is not None:
        from fedllm.models.reread import begin_with

        begin_with(start, model)
    profiles = make_profiles(recipe, list(federation.clients))
    return World(model, federation, local, recipe.seed, profiles,
                 Limits(batch_tokens=recipe.engine.step_tokens), e.exact_match, e.max_new_tokens,
                 recipe.data.completion_only, recipe.rounds, make_fleet(recipe),
                 *shelves(recipe, model.task, model.labels, lambda: model, profiles), metric=e.metric)


def recipe_model(recipe: Recipe, space: Space, task: str, labels: Sequence[str] = (),
                 device: str | None = None) -> Model:
    """The recipe's model with this space; `device` in the place of the recipe's."""
    m = recipe.model
    if m.shape and (acts(recipe) or m.name in NAMES):
        raise RecipeError(f"model.shape and model.name = {m.name!r} do not fit together: it is built by keys of its "
                          "own and has no config; leave shape out")
    if acts(recipe):
        return policy_of(recipe, space, device or m.device)
    if (made := made_of(recipe, space, task, labels, device or m.device)) is not None:
        return made
    task = "generation" if recipe.data.acts else task  # a language model speaks there; of rows it knows nothing
    return load_model(m.name, task, space, labels=labels, seed=recipe.seed, dtype=m.dtype, pooling=m.pooling,
                      fast_kernels=m.fast_kernels, device=device or m.device, trust_remote_code=m.trust_remote_code,
                      weights=m.weights, quantize=m.quantize, shape=m.shape)


def make_fleet(recipe: Recipe) -> Fleet | None:
    """What makes time in a simulation; None where time is real."""
    spec = recipe.clients
    return None if spec.step_seconds is None else Fleet(spec.step_seconds, spec.day_seconds, spec.day_share)


def by_key(path: str, make: Callable[[], T]) -> T:
    """Make one part; its errors name keys by the recipe's path (`method.mu`) and not by the class (`FedProx.mu`)."""
    try:
        return make()
    except RecipeError as error:
        owner, _, rest = str(error).removeprefix(f"{path}: ").partition(".")
        if rest and owner.isidentifier() and owner[:1].isupper():
            raise RecipeError(f"{path}.{rest}") from None
        raise


def make_recipe_space(recipe: Recipe) -> tuple[Space, str | None]:
    """The space, and the folder of the adapter that it starts from (`space.start_from`), if any."""
    return by_key("space", lambda: space_of(recipe.space))


def bound(layers: Sequence[Layer], recipe: Recipe, rows: Mapping[str, int], local: LocalSpec,
          guessed: bool = False) -> list[Layer]:
    """The layers, told what the run will be: the noise for a given epsilon follows from it. `guessed`: `rows` may
    be wrong.

    RecipeError for a schedule over the run's steps that does not fit the client with the fewest rows.
    """
    if rows:
        by_key("local", lambda: local.at(0, recipe.rounds, min(rows.values())))
    facts = replace(make_facts(recipe, rows, local), guessed=guessed)
    return [by_key(f"layers.{i}", functools.partial(layer.bind, replace(facts, below=tuple(layers[i + 1 :]))))
            for i, layer in enumerate(layers)]


def make_facts(recipe: Recipe, rows: Mapping[str, int], local: LocalSpec) -> Facts:
    """What layers may know of this run."""
    return Facts(rows, cohort_size(recipe.clients.per_round, len(rows)), recipe.rounds, local)


def _without_empty(federation: Federation) -> tuple[Federation, dict[str, str]]:
    if federation.streamed:  # a group has rows
        return federation, {}
    left = {c: "it has no training rows" for c, s in federation.clients.items() if not s.train}
    if len(left) == len(federation.clients):
        raise DataError(f"no client has training rows ({len(left)} clients); check data.source and data.partition")
    kept = {c: s for c, s in federation.clients.items() if c not in left}
    return replace(federation, clients=kept), left


def _embedder(recipe: Recipe) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> vectors by the recipe's own model, loaded only if a partition asks for it (`by_cluster`)."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        from fedllm.data.encode import Encoded
        from fedllm.local.forward import run_embeds
        from fedllm.local.generate import prompt_ids
        from fedllm.local.requests import Embed

        model = load_model(recipe.model.name, "classification", make_space("head"), labels=("any",),
                           trust_remote_code=recipe.model.trust_remote_code)
        rows = [Encoded(r, 0, 0) for r in prompt_ids(list(texts), model.tokenizer, 256)]
        return run_embeds([Embed("partition", model, {}, None, rows)], Limits())[0]

    return embed


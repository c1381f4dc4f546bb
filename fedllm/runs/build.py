"""From a checked recipe to the parts of a run: federation, model, method, layers, engine."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from fedllm.core.client import Fleet
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.layer import Facts, Layer
from fedllm.core.method import Method
from fedllm.core.record import Record
from fedllm.core.select import Selector
from fedllm.core.version import VERSION
from fedllm.data.federation import Federation
from fedllm.data.load import load_federation
from fedllm.engines import ENGINES, Vectorized
from fedllm.engines.world import World
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method, method_class, modules
from fedllm.models.load import lasting, load_model, load_tokenizer
from fedllm.models.made import NAMES
from fedllm.models.model import Model
from fedllm.privacy.composition import check_stack
from fedllm.runs.acting import acts, check_acting, policy_of
from fedllm.runs.best import check_best
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
FAR = ("flare", "flower")
"""Engines whose clients are other organisations."""
PACKAGES = ("torch", "transformers", "peft", "numpy")


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
    torch.set_num_threads(recipe.engine.threads)
    method = _part("method", lambda: make_method(recipe.method.name, **recipe.method.knobs))
    check_ranks(recipe, method)
    check_metrics(method)
    if not overrides(method, "round"):  # it answers and examines: there is nothing to go round for
        recipe = recipe.model_copy(update={"rounds": 0})
    make_recipe_space(recipe)
    check_names(recipe)
    installed(recipe.track)
    check_rules(recipe)
    judges_of(recipe.evaluate.metric)  # a function that is not there is refused before any row is read
    local = _part("local", lambda: LocalSpec.make(recipe.local, "local"))
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


def no_stages(recipe: Recipe) -> None:
    """RecipeError where one run is wanted, and the recipe says several."""
    if recipe.stages:
        names = ", ".join(s.name for s in recipe.stages)
        raise RecipeError(f"stages: this recipe is {len(recipe.stages)} runs ({names}), which `fedllm run` goes "
                          "through one after another; here one is needed: leave stages out, or name the folder of one")


def _shards(federation: Federation) -> Sequence[Any]:
    """The clients' rows; of streamed clients nothing is known before they are read."""
    return () if federation.streamed else list(federation.clients.values())


def check_ranks(recipe: Recipe, method: Method) -> None:
    """RecipeError for declared ranks that the method would not look at."""
    own = next((c for c, p in recipe.clients.profiles.items() if p.get("rank") is not None), None)
    if method.reads_ranks or not (recipe.clients.ranks or own):
        return
    key, value = ("clients.ranks", recipe.clients.ranks) if recipe.clients.ranks else (
        f"clients.profiles.{own}.rank", recipe.clients.profiles[str(own)]["rank"])
    able = [name for name in modules() if method_class(name).reads_ranks]
    raise RecipeError(f"{key} = {value}: method '{recipe.method.name}' trains the space's own rank at every client, so "
                      f"it would have no effect; leave it out, or use one of {', '.join(able)}")


def check_declared(recipe: Recipe, method: Method, world: World) -> None:
    """RecipeError for what clients declare or hold that the method cannot work with; a rank above a base's width is
    found here and not by the client that would train it."""
    if not world.federation.streamed:
        method.check_rows(world.federation.labels, {c: s.train for c, s in world.federation.clients.items()})
    most = max((r for c in world.infos() if (r := c.profile.rank) is not None), default=None)
    if most is not None and method.reads_ranks:
        try:
            world.model.initial(most)
        except RecipeError as error:
            where = "clients.ranks" if most in (recipe.clients.ranks or ()) else "clients.profiles"
            raise RecipeError(f"{where}: {error}") from None


def make_layers(recipe: Recipe, named: bool = False) -> tuple[list[Layer], Selector]:
    """The recipe's layers and its selector, which stands below them if it hears of clients; meters come last.
    `named`: some client holds a model of which the recipe does not know."""
    layers = [_part(f"layers.{i}", functools.partial(make_layer, n.name, n.knobs, f"layers.{i}"))
              for i, n in enumerate(recipe.layers)]
    selector = _part("select", lambda: make_selector(recipe.select.name, recipe.select.knobs))
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
    return [_part("energy", lambda: EdgeEnergy.make(first, "energy"))]


def heard_by(layers: Sequence[Layer], selector: Selector) -> Selector:
    """The selector as it stands on the stack, bound to the run; one that hears nothing stands nowhere."""
    return next((x for x in layers if isinstance(x, Selector)), selector)


def check_deadlines(recipe: Recipe, method: Method, world: World) -> None:
    """RecipeError for a deadline in which no client of the fleet could make even one step."""
    if world.fleet is None:
        return
    fleet = world.fleet
    least = min(fleet.compute(c.profile, 1.0) + 2 * c.profile.latency for c in world.infos())
    own = vars(method).get("deadline")  # some methods have a deadline of their own as a knob
    for key, value in (("clients.deadline", recipe.clients.deadline), ("method.deadline", own)):
        if value is not None and value < least:
            raise RecipeError(f"{key} = {value:g}: no client can make a single step in that time; one takes the "
                              f"fastest client {least:g} virtual seconds, so allowed is {least:g} and more")


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
    local = _part("local", lambda: LocalSpec.make(recipe.local, "local"))
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


def need_public(recipe: Recipe, method: Method, rows: int) -> None:
    """CompositionError when the method works on public rows and there are none."""
    if not rows and (at := method.public_at()):
        raise CompositionError(f"method '{recipe.method.name}' works on public rows at the {' and the '.join(at)}, and "
                               "the data has none; give data.public: a file, or (in a simulation) a fraction to set "
                               "aside")


def make_fleet(recipe: Recipe) -> Fleet | None:
    """What makes time in a simulation; None where time is real."""
    spec = recipe.clients
    return None if spec.step_seconds is None else Fleet(spec.step_seconds, spec.day_seconds, spec.day_share)


def _part(path: str, make: Callable[[], T]) -> T:
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
    return _part("space", lambda: space_of(recipe.space))


def compose(method: Method, layers: list[Layer]) -> None:
    """Let every layer look at the method; what would be unsound is refused with a CompositionError."""
    if any(not layer.optional for layer in layers) and overrides(method, "answer") and not overrides(method, "round"):
        raise CompositionError(f"method '{type(method).__name__}' answers questions and has no rounds, so the layers "
                               f"{[type(x).__name__ for x in layers]} would never act; leave 'layers' out")
    reducers = {n: f.__dict__.get("reduce") for n in dir(type(method))
                if callable(f := getattr(type(method), n)) and getattr(f, "__dict__", {}).get("runs_on_client")
                and "on_server" not in f.__dict__}
    check_stack(method, layers, reducers)
    method.check_layers(layers)


def bound(layers: Sequence[Layer], recipe: Recipe, rows: Mapping[str, int], local: LocalSpec,
          guessed: bool = False) -> list[Layer]:
    """The layers, told what the run will be: the noise for a given epsilon follows from it. `guessed`: `rows` may
    be wrong.

    RecipeError for a schedule over the run's steps that does not fit the client with the fewest rows.
    """
    if rows:
        _part("local", lambda: local.at(0, recipe.rounds, min(rows.values())))
    facts = replace(make_facts(recipe, rows, local), guessed=guessed)
    return [_part(f"layers.{i}", functools.partial(layer.bind, replace(facts, below=tuple(layers[i + 1 :]))))
            for i, layer in enumerate(layers)]


def make_facts(recipe: Recipe, rows: Mapping[str, int], local: LocalSpec) -> Facts:
    """What layers may know of this run."""
    return Facts(rows, cohort_size(recipe.clients.per_round, len(rows)), recipe.rounds, local)


def check_cohort(recipe: Recipe, method: Method, clients: Sequence[str]) -> None:
    """RecipeError or CompositionError where so many clients a round cannot do what the recipe wants of them."""
    asked = cohort_size(recipe.clients.per_round, len(clients))
    quorum = recipe.clients.quorum
    if isinstance(quorum, int) and quorum > asked:
        raise RecipeError(f"clients.quorum = {quorum} is not allowed with {asked} clients a round (of {len(clients)}): "
                          f"no round could count; it must be <= {asked}, or a share such as 1.0")
    method.check_clients(clients, asked)


def cohort_size(per_round: int | float, clients: int) -> int:
    """How many of these clients a round asks; a share is rounded half up, and is one client at least."""
    return min(per_round, clients) if isinstance(per_round, int) else max(1, int(per_round * clients + 0.5))


def overrides(method: Method, name: str) -> bool:
    """Whether the method's class says more about `name` than `Method` does."""
    mine = getattr(type(method), name, None)
    return mine is not None and mine is not Method.__dict__.get(name)


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


def resolved(parts: Parts) -> dict[str, Any]:
    """The recipe with every default written out, and the versions that it ran with."""
    full = parts.recipe.model_dump()
    full["method"] = {"name": parts.recipe.method.name, **_plain(parts.method)}
    start = parts.recipe.space.knobs.get("start_from")
    full["space"] = {"name": parts.recipe.space.name, **_plain(parts.world.model.space)}
    if start is not None:
        full["space"]["start_from"] = start
    full["local"] = _plain(parts.world.local)
    if "labels" in parts.world.model.rules.takes:
        full["data"]["labels"] = list(parts.world.federation.labels)
    full["model"]["name"] = lasting(parts.recipe.model.name)  # a run is talked to and exported from any folder
    full["versions"] = {"python": platform.python_version(), **versions()}
    return full


def versions() -> dict[str, str]:
    """The packages that decide a run's bits. Our own is asked of the code: its distribution has another name."""
    return {"fedllm": VERSION} | {p: importlib.metadata.version(p) for p in PACKAGES}


def _plain(part: Any) -> dict[str, Any]:
    """A dataclass as what YAML can hold."""
    values = asdict(part) if is_dataclass(part) and not isinstance(part, type) else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

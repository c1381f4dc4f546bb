"""What fits together and what does not: a recipe's method, layers, clients and rows, refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import Layer, name_of
from fedllm.core.method import Method
from fedllm.engines.world import World
from fedllm.methods.registry import method_class, modules
from fedllm.privacy.composition import check_stack
from fedllm.runs.recipe import Recipe


def no_stages(recipe: Recipe) -> None:
    """RecipeError where one run is wanted, and the recipe says several."""
    if recipe.stages:
        names = ", ".join(s.name for s in recipe.stages)
        raise RecipeError(f"stages: this recipe is {len(recipe.stages)} runs ({names}), which `fedllm run` goes "
                          "through one after another; here one is needed: leave stages out, or name the folder of one")


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
    method.check_profiles(world.model, world.infos())
    most = max((r for c in world.infos() if (r := c.profile.rank) is not None), default=None)
    if most is not None and method.reads_ranks:
        try:
            world.model.initial(most)
        except RecipeError as error:
            who = next(c.id for c in world.infos() if c.profile.rank == most)
            key = "clients.ranks" if most in (recipe.clients.ranks or ()) else f"clients.profiles.{who}.rank"
            raise RecipeError(str(error).replace("space.rank", key, 1)) from None


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


def need_public(recipe: Recipe, method: Method, rows: int) -> None:
    """CompositionError when the method works on public rows and there are none."""
    if not rows and (at := method.public_at()):
        raise CompositionError(f"method '{recipe.method.name}' works on public rows at the {' and the '.join(at)}, and "
                               "the data has none; give data.public: a file, or (in a simulation) a fraction to set "
                               "aside")


def compose(method: Method, layers: list[Layer]) -> None:
    """Let every layer look at the method; what would be unsound is refused with a CompositionError."""
    if any(not layer.optional for layer in layers) and overrides(method, "answer") and not overrides(method, "round"):
        raise CompositionError(f"method '{name_of(method)}' answers questions and has no rounds, so the layers "
                               f"{[name_of(x) for x in layers]} would never act; leave 'layers' out")
    reducers = {n: f.__dict__.get("reduce") for n in dir(type(method))
                if callable(f := getattr(type(method), n)) and getattr(f, "__dict__", {}).get("runs_on_client")
                and "on_server" not in f.__dict__}
    check_stack(method, layers, reducers)
    method.check_layers(layers)


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

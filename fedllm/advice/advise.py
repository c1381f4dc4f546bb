"""Names two or three methods that a recipe's parts allow, with the leaderboard's rows behind each and the reason."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedllm.advice.standing import board, places, rows_for, share_of_bytes, standing
from fedllm.core.card import Trial
from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.methods.asking import Asking
from fedllm.methods.registry import METHODS, method_class
from fedllm.runs.build import Parts, build
from fedllm.runs.fits import cohort_size
from fedllm.runs.recipe import Recipe, load_recipe, read_recipe

ALONE = ("local_only", "centralized")
"""No federations: what others are held against, and nothing to advise."""
MOST = 3
RARE = 0.1
"""Share of the clients a round below which a client comes back too rarely for what it keeps to be fresh."""
ALIKE = 3
"""Refusals with the same words after which the recipe itself is at fault."""
NUMBER = 4
"""Bytes of a trained number on the wire."""


@dataclass(frozen=True)
class Wants:
    """What a method must be, from the recipe and from what was asked for beside it."""

    personal: bool = False
    """Each client shall have a model of its own; order by clients' own tests."""
    stateless: bool = False
    """Clients keep nothing from one round to the next."""
    zeroth_order: bool = False
    """Clients take no gradients: forward passes alone."""
    bytes: float | None = None
    """Most bytes of a run, up and down, all clients."""


@dataclass(frozen=True)
class Advised:
    """One method, why, and what is known of it."""

    method: str
    title: str
    reasons: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """Of the leaderboard, each with its `place` and `of` how many."""
    bytes: float | None
    """Of a run of this recipe, about: FedAvg's by the number of trained weights, times this method's share of it."""


@dataclass(frozen=True)
class Advice:
    """What came of it."""

    recipe: str
    says: Sequence[str]
    """What was read from the recipe and the options."""
    methods: Sequence[Advised]
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Methods that stand before these on the leaderboard or were looked at, and why not."""
    then: str = ""
    """The command that holds them against each other on the recipe's own rows."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def advise(source: str | Path | Mapping[str, Any] | Recipe, wants: Wants | None = None,
           overrides: Mapping[str, Any] | None = None) -> Advice:
    """Up to three methods for the recipe, the best of the leaderboard's order that the recipe builds with.

    The recipe's own method does not matter. Loads rows and model, and trains nothing. RecipeError where no method
    fits, or where the recipe cannot be built whatever the method.
    """
    recipe, asked = load_recipe(source, overrides), wants or Wants()
    said, asked = read_wants(recipe, asked)
    if not (rows := rows_for(recipe.data.task)) and (rows := rows_for()):
        said.append("the leaderboard has no row of this task, so that those of other tasks are taken")
    which = "personal" if asked.personal else "global"
    found = places(rows, which)
    chosen: list[Advised] = []
    passed: dict[str, str] = {}
    refused: list[str] = []
    for method in in_order(recipe, found):
        if len(chosen) == MOST or (len(chosen) == MOST - 1 and standing(method, found) is None):
            break  # there are enough, or the rest has no rows
        if why := unfit(method, asked, [r for r in rows if r["method"] == method]):
            passed[method] = why
            continue
        told = _looked_at(recipe, method, asked, rows, found, which)
        if isinstance(told, str):
            passed[method] = told
            refused.append(told)
            if not chosen and refused == [told] * ALIKE:
                raise RecipeError(told)  # the same for all: it is not the method
        elif len(chosen) < MOST - 1 or not _light(chosen, told):
            chosen.append(told)
        else:
            passed[method] = "it sends more than both that stand before it"
    if not chosen:
        common = "; ".join(f"{why} ({n} methods)" for why, n in Counter(passed.values()).most_common(3))
        raise RecipeError(f"no method fits ({', '.join(said)}): {common}")
    return Advice(recipe.name, said, chosen, passed, _then(source, overrides or {}, [a.method for a in chosen]))


def _then(source: object, overrides: Mapping[str, Any], names: Sequence[str]) -> str:
    """The command that compares them, on the recipe as it was changed here."""
    where = str(source) if isinstance(source, str | Path) else "RECIPE"
    changed = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()
               if key.partition(".")[0] != "method"]  # these are named instead
    return shlex.join(["fedllm", "compare", where, *changed, "--methods", ",".join(names)])


def _light(chosen: Sequence[Advised], told: Advised) -> bool:
    """Whether a third method would be as heavy as both that are there; one that costs less is looked for first."""
    return False if told.bytes is None else all(a.bytes is not None and told.bytes > a.bytes for a in chosen)


def read_wants(recipe: Recipe, wants: Wants) -> tuple[list[str], Wants]:
    """What the recipe and the options say, in words, and as the method must be."""
    c, said = recipe.clients, [f"task {recipe.data.task}"]
    if ranks := c.ranks or [p["rank"] for p in c.profiles.values() if p.get("rank") is not None]:
        said.append(f"ranks by client ({', '.join(map(str, sorted(set(ranks))))})")
    if c.models:
        said.append(f"models by client ({', '.join(sorted(set(c.models)))})")
    if recipe.layers:
        said.append(f"layers {', '.join(n.name for n in recipe.layers)}")
    rare = (c.per_round <= RARE) if isinstance(c.per_round, float) else _rare(recipe)
    if rare and not wants.stateless:
        wants = Wants(**{**asdict(wants), "stateless": True})
        said.append(f"stateless clients (clients.per_round = {c.per_round}: one comes back rarely)")
    elif wants.stateless:
        said.append("stateless clients")
    said += ["forward passes alone"] * wants.zeroth_order + ["a model for each client"] * wants.personal
    if wants.bytes is not None:
        said.append(f"{wants.bytes:,.0f} bytes a run")
    return said, wants


def _rare(recipe: Recipe) -> bool:
    clients = recipe.data.partition.get("clients")
    return isinstance(clients, int) and recipe.clients.per_round <= RARE * clients


def in_order(recipe: Recipe, found: Mapping[tuple[str, str], tuple[int, int]]) -> Iterator[str]:
    """Methods that learn: by their standing, then those without a row, baselines before what is newer.

    Those whose own tests are of this task, where it is none that every method has, come before what rows of other tasks
    say.
    """
    names = [n for n in METHODS if n not in ALONE and not issubclass(method_class(n), Asking)
             and not method_class(n).simulation_only]
    task, worlds = recipe.data.task, board()["worlds"]
    ranked = {n: s for n in names if (s := standing(n, found)) is not None}
    made = {n for n in names if method_class(n).trial.task == task != Trial().task}
    told = any(worlds[world]["task"] == task for world, _ in found)
    yield from sorted(names, key=lambda n: (n not in made if not told else n not in ranked, n not in ranked,
                                            ranked.get(n, 0.0), n not in made,
                                            method_class(n).card.topic != "baselines", n))


def _looked_at(recipe: Recipe, method: str, wants: Wants, rows: Sequence[Mapping[str, Any]],
               found: Mapping[tuple[str, str], tuple[int, int]], which: str) -> Advised | str:
    """The method with its reasons, or why not."""
    mine = [r for r in rows if r["method"] == method]
    try:
        with _quietly():
            parts = build(read_recipe(recipe, {"method": {"name": method}}))
    except FedLLMError as error:
        return str(error)
    share = share_of_bytes(method, rows)
    cost = None if share is None else share * bytes_of_fedavg(parts)
    if wants.bytes is not None and (cost is None or cost > wants.bytes):
        return "no row tells its bytes" if cost is None else f"about {cost:,.0f} bytes a run, above the limit"
    told = [{**{k: r[k] for k in ("world", which, "up", "down", "cpu_seconds", "memory", "joules", "seeds", "front")},
             "title": board()["worlds"][r["world"]]["title"], "metric": board()["worlds"][r["world"]]["metric"],
             **dict(zip(("place", "of"), found[r["world"], method], strict=True))}
            for r in mine if (r["world"], method) in found]
    return Advised(method, method_class(method).card.title, reasons(parts, wants, told, which), told, cost)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what a run says of its model and rows: here it would be said once for each method."""
    log = logging.getLogger("fedllm")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def unfit(method: str, wants: Wants, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why it is not what is wanted, by what its runs on the leaderboard did; empty where it is."""
    needed = wants.stateless or wants.zeroth_order or wants.personal
    if needed and not rows:
        return "no row of the leaderboard says whether it is what is wanted"
    if wants.stateless and any(r["remember"] for r in rows):
        return "its clients keep something from one round to the next"
    if wants.zeroth_order and any(r["gradients"] for r in rows):
        return "its clients take gradients"
    if wants.personal and not any(r["own_part"] or not r["serves"] for r in rows):
        return "its clients all end with the same model"
    return ""


def bytes_of_fedavg(parts: Parts) -> float:
    """What FedAvg would send with this recipe: all trained numbers, down and up, each client of each round."""
    trained = sum(t.numel() for t in parts.world.model.initial().values())
    cohort = cohort_size(parts.recipe.clients.per_round, len(parts.world.federation.clients))
    return 2.0 * NUMBER * trained * cohort * parts.recipe.rounds


def reasons(parts: Parts, wants: Wants, rows: Sequence[Mapping[str, Any]], which: str) -> list[str]:
    """Why this one, each in a few words."""
    out, kind, recipe = [], type(parts.method), parts.recipe
    if recipe.clients.ranks or any(p.get("rank") is not None for p in recipe.clients.profiles.values()):
        out.append("each client trains the rank that it declares")
    if recipe.clients.models:
        out.append("clients may hold models of other designs")
    if recipe.layers:
        out.append(f"it runs under {', '.join(n.name for n in recipe.layers)}")
    if wants.stateless:
        out.append("its clients kept nothing between rounds")
    if wants.zeroth_order:
        out.append("its clients make forward passes alone")
    if wants.personal:
        out.append("each client ends with a model of its own")
    of_this = {name for name, world in board()["worlds"].items() if world["task"] == recipe.data.task}
    out += [f"{r['place']} of {r['of']} on {r['world']} by the {which} model's {r['metric']}"
            + ("" if r["world"] in of_this else ", which is another task") for r in rows]
    if any(which in r["front"] for r in rows):
        out.append("no other is as good for fewer bytes there")
    if not rows:
        out.append(f"it builds with this recipe; the leaderboard has no row of it for this task ({kind.card.topic})")
    return out

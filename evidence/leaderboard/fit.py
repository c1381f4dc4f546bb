"""How a method is put on a world: the forms in which it may fit, and the points that are tried, so many for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evidence.leaderboard.worlds import World
from fedllm.methods.asking import Asking
from fedllm.methods.registry import METHODS, method_class

Edits = Mapping[str, Any]
TRIES = 3
"""Points that each method is tried on; no method gets more."""
ANSWERS = "it answers questions with a model that is there: nothing is trained"


def family(method: str) -> str:
    """The chapter that its file lies in; who brings it, where it is not ours."""
    module = METHODS.ours.get(method)
    return module.split(".")[-2] if module else METHODS.whose(method)


def trains(method: str) -> bool:
    """Whether it learns from rows; others answer questions with a model that is there."""
    return not issubclass(method_class(method), Asking)


def forms(method: str, world: World) -> Iterator[Edits]:
    """The recipe's keys for the method, from the plainest form on: its knobs as they are or as its tests set them, the
    world's optimizer or the one it needs. The first that builds is taken."""
    kind = method_class(method)
    trial, steps = kind.trial, world.recipe["local"]["steps"]
    own = {"steps": steps} if "steps" in kind.knobs() else {}  # the same client steps as everybody
    optimizer = {k: v for k, v in trial.local.items() if k == "optimizer"}
    ranks = {"clients.ranks": list(trial.ranks)} if trial.ranks and kind.reads_ranks else {}
    spaces = [space_of(method, world)]
    if trial.space["name"] != world.recipe["space"]["name"]:
        spaces.append(_like(trial.space, {"name": "-"}))  # streams that change the same modules
    seen: list[Edits] = []
    for space, local in itertools.product(spaces, ({}, optimizer)):
        for knobs in (own, {**_plain(trial.knobs), **own}):
            form = {"space": space, **ranks, "method": {"name": method, **knobs},
                    **{f"local.{k}": v for k, v in local.items()}}
            if form not in seen:
                seen.append(form)
                yield form


def space_of(method: str, world: World) -> dict[str, Any]:
    """The world's space, or the one that the method's tests give it; LoRA in it has the world's rank and places."""
    wanted, base = dict(method_class(method).trial.space), dict(world.recipe["space"])
    if wanted["name"] == base["name"]:
        return {**base, **{k: v for k, v in wanted.items() if k not in ("rank", "targets")}}
    return _like(wanted, base)


def _like(space: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    if space.get("name") == base["name"]:
        return {**base, **{k: v for k, v in space.items() if k not in base}}
    of = {k: _like(v, base) if isinstance(v, Mapping) else v for k, v in _plain(space.get("of", {})).items()}
    return {**_plain(space), **({"of": of} if of else {})}


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, which YAML can hold."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def rate_axis(world: World, form: Edits) -> Sequence[float]:
    """The values of `local.lr` for this form."""
    if form.get("local.optimizer") == "sgd":
        return world.rates["sgd"]
    space = form["space"]
    parts = [space, *({"name": v} if isinstance(v, str) else v for v in space.get("of", {}).values())]
    return world.rates["full" if any(p["name"] == "full" for p in parts) else ""]


def own_axis(method: str) -> tuple[str, Sequence[float]] | None:
    """The knob that is tried beside the rate, if any: the first that a claim of the card tunes, or else the method's
    own `lr`, from its default (the paper's, for large models) to what its tests take (small ones)."""
    kind = method_class(method)
    for claim in (kind.card.claim, *kind.card.also.values()):
        for key, values in claim.grid.items():
            name = key.removeprefix("knobs.")
            if key != name and name in kind.knobs():
                return f"method.{name}", _three(sorted(values))
    if "lr" in kind.knobs():
        far, near = float(kind.knobs()["lr"]["default"]), float(kind.trial.knobs.get("lr", 0) or 0)
        near = near if near and near != far else far / 10
        return "method.lr", (min(far, near), (far * near) ** 0.5, max(far, near))
    return None


def _three(values: Sequence[float]) -> Sequence[float]:
    """The first, middle and last of several values."""
    return (values[0], values[(len(values) - 1) // 2], values[-1])


def points(method: str, world: World, form: Edits) -> list[dict[str, Any]]:
    """TRIES points. With a knob beside the rate each value of both is tried once, the middle with the middle and the
    ends crosswise (a Latin square), since a larger step of the one wants a smaller one of the other."""
    rates, own = rate_axis(world, form), own_axis(method)
    if own is None:
        return [{"local.lr": rate} for rate in rates[:TRIES]]
    key, values = own
    pairs = zip(rates[:TRIES], reversed(values), strict=True)
    return [{"local.lr": rate, key: float(f"{value:.3g}")} for rate, value in pairs]

"""What clients declare of themselves, from the recipe: common values, laws that each draws from, single profiles."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fedllm.core.client import Profile
from fedllm.core.energy import DEVICES, LINKS, Link, device_of, link_of
from fedllm.core.errors import RecipeError
from fedllm.core.knobs import check_knob
from fedllm.core.rng import numpy_stream
from fedllm.core.shares import SHARES
from fedllm.runs.recipe import Recipe
from fedllm.runs.sections import EnergySpec


def make_profiles(recipe: Recipe, clients: list[str]) -> dict[str, Profile]:
    """What each client declares: the recipe's common values, then its own."""
    spec = recipe.clients
    out: dict[str, Profile] = {}
    alike: dict[Profile, Profile] = {}
    for unknown in spec.profiles.keys() - set(clients):
        near = difflib.get_close_matches(unknown, clients, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise RecipeError(f"clients.profiles.{unknown}: no such client{hint} The data has {', '.join(clients[:12])}")
    for i, client in enumerate(clients):
        values: dict[str, Any] = {"availability": spec.availability, "latency": spec.latency, "dropout": spec.dropout,
                                  "speed": drawn(spec.speed, 1.0, recipe.seed, i, client, "speed")}
        if spec.bandwidth is not None:
            values["bandwidth"] = drawn(spec.bandwidth, 1e6, recipe.seed, i, client, "bandwidth")
        values |= dealt(recipe.energy, i)
        if spec.ranks:
            values["rank"] = spec.ranks[i % len(spec.ranks)]
        if spec.models:
            values["model"] = spec.models[i % len(spec.models)]
        for key, value in spec.profiles.get(client, {}).items():
            check_profile(f"clients.profiles.{client}", key, value)
            values[key] = value
        if link := _line(recipe.energy, values.get("link")):
            values["bandwidth"] = values.get("bandwidth") or link.bandwidth
            values["latency"] = values["latency"] or link.latency
        made = Profile(**values)
        out[client] = alike.setdefault(made, made)  # of 100,000 clients most declare the same
    return out


def drawn(law: Any, middle: float, seed: int, place: int, client: str, what: str) -> float:
    """This client's value: the same for all, its own of a list, or drawn from the recipe's seed."""
    if isinstance(law, list):
        return float(law[place % len(law)])
    if not isinstance(law, Mapping):
        return float(law)
    ((kind, given),) = law.items()
    rng = numpy_stream(seed, client, what)
    if kind == "lognormal":
        return float(middle * np.exp(rng.normal(0.0, given[0] if isinstance(given, list) else given)))
    return float(rng.uniform(*given)) if kind == "uniform" else float(rng.choice(given))


def dealt(spec: EnergySpec | None, place: int) -> dict[str, str]:
    """The names of the client's device and link, where the recipe's energy section names some."""
    found = {}
    for key, of in (("device", device_of), ("link", link_of)) if spec else ():
        given = getattr(spec, key)
        if isinstance(given, list):
            for name in given:
                of(name, f"energy.{key}")
            given = given[place % len(given)]
        if isinstance(given, str):
            found[key] = given
    return found


def _line(spec: EnergySpec | None, name: str | None) -> Link | None:
    """The link whose bandwidth and latency hold for a client that declares none."""
    return LINKS.get(name) if name else link_of(spec.link, "energy.link") if spec else None


LIMITS: dict[str, Mapping[str, Any]] = {
    "device": {"options": tuple(DEVICES)}, "link": {"options": tuple(LINKS)},
    "rank": {"ge": 1}, "memory_bytes": {"ge": 1}, "bandwidth": {"gt": 0}, "speed": {"gt": 0},
    "availability": {"gt": 0, "le": 1}, "latency": {"ge": 0}, "dropout": {"ge": 0, "lt": 1},
    "shares": {"options": SHARES}}


def check_profile(path: str, key: str, value: Any) -> None:
    """RecipeError for a key that no profile has, or a value that it may not have."""
    names = [f.name for f in fields(Profile)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise RecipeError(f"{path}.{key}: unknown key{hint} Allowed here: {', '.join(names)}")
    kind = next(f.type for f in fields(Profile) if f.name == key)
    check_knob(path, key, value, LIMITS.get(key, {}), kind)
    text = isinstance(value, str) and value.isprintable() and len(value) <= 256
    if value is not None and not LIMITS.get(key) and not text:
        raise RecipeError(f"{path}.{key} = {value!r} is not allowed; it must be a text of up to 256 characters")

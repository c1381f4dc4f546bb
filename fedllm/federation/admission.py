"""What of a coordinator's recipe a site takes: nothing that reaches for its files, its network or its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.engines.far.reasons import Refused
from fedllm.federation.settings import SiteSettings
from fedllm.methods.registry import METHODS, method_class
from fedllm.models.load import OWN
from fedllm.models.made import NAMES as BUILT
from fedllm.runs.recipe import Recipe, read_recipe
from fedllm.runs.resolved import versions
from fedllm.runs.sections import NamedModel
from fedllm.runs.store import private_folder, read_json, write_atomic
from fedllm.tasks.answers import CALL, judges_of, listed

SHAPE = "shape.json"
SHAPES = ("task", "fields", "template", "labels", "split", "subset", "entity", "windows", "sequences")
"""Keys of `data` that say how this site's rows are read."""
HUB = "huggingface.co"
OWN_MODELS = (*OWN, *BUILT)
NOT_SENT = ("source", "test", "public", "partition", "office", "environment")
"""Keys of `data` that a coordinator keeps to itself, and of which a site takes none from anybody: an environment's
tools may be a command, which a site runs where its own settings name it alone."""


def same_versions(theirs: Mapping[str, str], settings: SiteSettings) -> None:
    """Raise `Refused` when a package that must be the coordinator's is another here."""
    mine = versions()
    for package in settings.same_packages:
        if theirs.get(package) != mine.get(package):
            raise Refused("versions", f"the run asks for {package} {theirs.get(package)}, this site has installed "
                                      f"{mine.get(package)}; install the same version on both sides")


def admitted(raw: Mapping[str, Any], settings: SiteSettings) -> Recipe:
    """The coordinator's recipe with this site's data, endpoint and keys, if it asks for nothing that is forbidden."""
    if raw.get("plugins"):
        raise Refused("plugins", f"plugins = {str(raw['plugins'])[:200]}: install the method here as a package (entry "
                                 "point fedllm.methods), and name it in this site's settings (methods)")
    raw = {**raw, "method": _own_keys(_own_endpoint(raw["method"], settings), settings),
           "models": _own_endpoints(raw.get("models") or {}, settings),
           "layers": [_own_keys(layer, settings) for layer in raw.get("layers", ())]}
    data = {k: v for k, v in raw["data"].items() if k not in NOT_SENT}
    own = {"environment": settings.own_environment()} if settings.acts else {
        "test": 0.0, "partition": {"kind": "per_file"}}
    recipe = read_recipe({**raw, "data": {**data, "source": settings.data, **own}})
    _method(recipe.method.name, settings)
    for name in listed(recipe.evaluate.metric):  # no function has been looked for yet
        if name.startswith(CALL) and name.removeprefix(CALL) not in settings.metrics:
            raise Refused("metric", f"{name}; named here are {', '.join(settings.metrics) or 'none'}")
    judges_of(recipe.evaluate.metric)
    if recipe.model.trust_remote_code and not settings.trust_remote_code:
        raise Refused("remote_code", "model.trust_remote_code = true is forbidden by this site")
    _reach(recipe, settings)
    fixed(recipe, settings)
    return recipe


def _method(name: str, settings: SiteSettings) -> None:
    if settings.methods is not None and name not in settings.methods:
        raise Refused("method", f"method '{name}' is not on this site's allow-list "
                                f"({', '.join(settings.methods) or 'empty'})")
    if name not in METHODS:
        raise Refused("not_installed", f"method '{name}'")
    if name not in METHODS.ours and settings.methods is None:
        raise Refused("method", f"method '{name}' comes from {METHODS.whose(name)} and not from fedllm; name it in "
                                f"this site's settings (methods: [{name}]) if it may run here")
    kinds = method_class(name).card.kinds
    numbers = method_class(name).shares and settings.profile.get("shares") in ("scores", "counts")
    if kinds and not settings.text_leaves and not numbers:
        raise Refused("text", f"method '{name}' sends {', '.join(kinds)}")


def _own_endpoint(method: Any, settings: SiteSettings) -> dict[str, Any]:
    """The method as the recipe has it, but with this site's endpoint in the place of the coordinator's."""
    told = {"name": method} if isinstance(method, str) else dict(method)
    if not told.get("endpoint"):
        return {k: v for k, v in told.items() if k != "api_key_env"}
    mine = settings.endpoint
    if mine is None:
        raise Refused("endpoint", f"the recipe's is {str(told['endpoint'])[:100]!r}")
    return {**told, "endpoint": mine.url, "endpoint_model": mine.model, "api_key_env": mine.key_env}


def _own_endpoints(models: Mapping[str, Any], settings: SiteSettings) -> dict[str, Any]:
    """The recipe's models by name, of which one that is an endpoint becomes this site's own; where there is none, it is
    refused when the run asks for it (`may_load`)."""
    told = {name: spec["endpoint"] for name, spec in models.items()
            if isinstance(spec, Mapping) and spec.get("endpoint")}
    mine = settings.endpoint
    if mine is None or not told:
        return dict(models)
    if len({(e.get("base_url"), e.get("model")) for e in told.values()}) > 1:
        raise Refused("endpoint", f"models: {', '.join(told)} are different endpoints, and this site has one")
    own = {"base_url": mine.url, "model": mine.model, "api_key_env": mine.key_env}
    return {**models, **{name: {**models[name], "endpoint": {**e, **own}} for name, e in told.items()}}


def may_load(settings: SiteSettings, key: str, spec: NamedModel) -> None:
    """Raise `Refused` for a model of the recipe that this site does not load, or put its text to."""
    if spec.endpoint is not None and settings.endpoint is None:
        raise Refused("endpoint", f"{key}.endpoint is {str(spec.endpoint.get('base_url'))[:100]!r} in the recipe; "
                                  "`fedllm join --endpoint ADDRESS` names this site's own")
    if spec.name is not None:
        _look(key, spec.name, settings, spec.name not in OWN_MODELS)
    for at, value in _texts(spec.space.knobs if spec.space else {}, f"{key}.space"):
        _look(at, value, settings, at.endswith("space.start_from") and "/" in value)


def _own_keys(part: Any, settings: SiteSettings) -> dict[str, Any]:
    """A layer or method with this site's own folder of identity keys, if it wants one."""
    told = {"name": part} if isinstance(part, str) else dict(part)
    if told.get("keys") is None:
        return told
    if settings.keys is None:
        raise Refused("path", f"{told['name']}.keys: this site's settings name no folder of identity keys (keys)")
    return {**told, "keys": settings.keys}


def _reach(recipe: Recipe, settings: SiteSettings) -> None:
    """Raise `Refused` for what lies outside: paths that this site did not open, hosts that it does not name."""
    own = {settings.keys, settings.endpoint and settings.endpoint.url}
    parts = {"method": recipe.method.knobs, "space": recipe.space.knobs, "select": recipe.select.knobs,
             "local": recipe.local, **{f"layers.{i}": x.knobs for i, x in enumerate(recipe.layers)}}
    for key, value in [("model.name", recipe.model.name), *_texts(parts)]:
        if value in own:
            continue
        _look(key, value, settings, (key == "model.name" and value not in OWN_MODELS)
              or (key == "space.start_from" and "/" in value))


def _look(key: str, value: str, settings: SiteSettings, hub: bool) -> None:
    """Raise `Refused` for an address, a path that is not open, or (`hub`: it is no path) what only the Hub has."""
    if "://" in value or value.startswith("hub:"):
        raise Refused("network", f"{key} = {value[:100]!r}")
    if value.startswith(("/", ".", "~")) or Path(value).exists():
        _inside(key, value, settings)
    elif hub and HUB not in settings.hosts:
        raise Refused("network", f"{key} = {value!r} would be fetched from {HUB}, which is not among hosts")


def _texts(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, with its key's path."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, v in value.items():
            yield from _texts(v, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _texts(v, at)


def _inside(key: str, value: str, settings: SiteSettings) -> None:
    real = Path(value).expanduser().resolve()
    if not any(real.is_relative_to(Path(folder).resolve()) for folder in settings.models):
        raise Refused("path", f"{key} = {value!r} is a path outside of the folders that this site opened "
                              f"({', '.join(settings.models) or 'none'}); use `fedllm join --models FOLDER`")


def fixed(recipe: Recipe, settings: SiteSettings) -> None:
    """Rows are shaped as this site's settings say; what they leave open the first run that asks fixes, before any row
    is read: a coordinator that asks again with other labels or fields reads nothing from which of them fail."""
    told = recipe.data.model_dump(mode="json")
    asked = {key: told[key] for key in SHAPES}
    said = {k: v for k in ("task", "fields", "template", "labels") if (v := getattr(settings, k)) is not None}
    for key, value in said.items():
        if asked[key] != value:
            raise Refused("fields", f"data.{key} = {asked[key]!r}: this site's settings say {value!r}")
    if settings.rows_may_change:
        return
    path = private_folder(Path(settings.store)) / SHAPE
    open_ = json.loads(json.dumps({k: v for k, v in asked.items() if k not in said}))
    if not path.exists():
        write_atomic(path, json.dumps(open_, indent=1).encode())
        return
    kept = read_json(path)
    if differ := [k for k, v in open_.items() if k in kept and kept[k] != v]:
        raise Refused("fields", f"data.{', data.'.join(differ)} is not what the first run fixed ({path}); delete the "
                                "file or name them in this site's settings to take part")

"""What a finished run leaves to be used: an adapter or a model, and the clients' personal parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedllm.core.method import Method, State
from fedllm.core.payload import leaves, pack
from fedllm.models.load import resolve
from fedllm.models.made import NAMES as BUILT
from fedllm.models.merge import save_merged
from fedllm.models.model import Model
from fedllm.models.peft_io import apart, save_adapter, save_trainables
from fedllm.models.reread import reread
from fedllm.runs.folder import RunFolder

BASE = "base_delta.safetensors"
"""What the method merged into the frozen base: dense changes by weight name, to be added before the adapter."""


def write_served(folder: RunFolder, model: Model, method: Method, state: State,
                 models: Mapping[str, Any] = MappingProxyType({})) -> str | None:
    """The served model as `adapter/` (PEFT), for a space that PEFT does not have as `model/`, for one that is no change
    of weights as `trainables/`; its folder's name.

    None when the method serves no single model, or none at all. Modules that stand side by side go to `modules/`,
    and what the server trained of the recipe's `models` to `models/`.
    """
    for name, theta in method.trained(state).items():
        if theta and name in models:
            with folder.replacing(f"models/{safe(name)}") as temp:
                write_tree(temp, models[name], theta, None)
    for name, module in method.modules(state).items():
        with folder.replacing(f"modules/{safe(name)}") as temp:
            write_tree(temp, model, module, None)
    theta, base = method.served(state) if method.serves else ({}, None)
    if not theta:
        return None
    kind = form_of(model, theta)
    with folder.replacing(kind) as temp:
        write_tree(temp, model, theta, base)
    return kind


def write_tree(folder: Path, model: Model, theta: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
    """One set of trainables in this folder, in the form that `form_of` says."""
    if model.name in BUILT:
        save_file(apart(theta), folder / f"{model.name}.safetensors")
        return
    if (form := form_of(model, theta)) == "model":
        return save_merged(folder, model, theta, base)
    if form == "trainables":
        return save_trainables(folder, model, theta, resolve(model.name))
    save_adapter(folder, model, theta, resolve(model.name))
    reread(folder, model, theta)
    if base:
        save_file(apart(base), folder / BASE)


def form_of(model: Model, theta: Mapping[str, Tensor]) -> str:
    """What becomes of trainables: an `adapter` where PEFT has the space, else a `model` with them in its weights, else
    the `trainables` as they are."""
    if model.name in BUILT:
        return "model"
    if model.space.to_peft(model.net, model.task, theta) is not None:
        return "adapter"
    return "trainables" if model.space.stays else "model"


def write_clients(folder: RunFolder, model_of: Callable[[str], Any], memory: Mapping[str, Mapping[str, Any]]) -> int:
    """`clients/<id>/` for each client with a memory: adapters where it holds trainables of its model, plain tensors
    otherwise."""
    known: dict[int, set[str]] = {}
    for client, kept in memory.items():
        if not kept:
            continue
        with folder.replacing(f"clients/{safe(client)}") as temp:
            model = model_of(client)
            if id(model) not in known:
                known[id(model)] = set(model.initial()) if isinstance(model, Model) else set()
            _write_memory(temp, model, kept, known[id(model)], folder.path / "model")
    return sum(bool(kept) for kept in memory.values())


def _write_memory(folder: Path, model: Model, kept: Mapping[str, Any], names: set[str], served: Path) -> None:
    """A personal stream that PEFT has becomes an adapter of the served model, over which it was trained."""
    rest: dict[str, Any] = {}
    for key, value in kept.items():
        if names and isinstance(value, Mapping) and set(value) == names:
            (folder / key).mkdir()
            write_tree(folder / key, model, value, None)
        elif names and key in model.space.personal and served.is_dir() and model.task == "generation" and (
                form_of(model, stream := pack(**{key: value})) == "adapter"):
            save_adapter(folder / key, model, stream, str(served.resolve()))
        else:
            rest[key] = value
    flat = dict(leaves(rest))
    if tensors := {n: t for n, t in flat.items() if isinstance(t, Tensor)}:
        save_file(apart(tensors), folder / "memory.safetensors")
    plain = {n: v for n, v in flat.items() if not isinstance(v, Tensor)}
    if plain:
        (folder / "memory.json").write_text(json.dumps(plain, indent=2, default=str))


def safe(client: str) -> str:
    """A client's id as a folder name."""
    name = "".join(c if c.isalnum() or c in "-_.@~" else "_" for c in client).lstrip(".") or "_"
    if len(name.encode()) <= 200:
        return name
    return name.encode()[:180].decode(errors="ignore") + "-" + hashlib.sha256(client.encode()).hexdigest()[:12]

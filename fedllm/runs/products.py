"""What a finished run leaves to be used: an adapter or a model, and the clients' personal parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedllm.core.method import Method, State
from fedllm.core.payload import leaves
from fedllm.models.load import resolve
from fedllm.models.merge import save_merged
from fedllm.models.model import Model
from fedllm.models.peft_io import save_adapter
from fedllm.models.reread import reread
from fedllm.runs.folder import RunFolder

BASE = "base_delta.safetensors"
"""What the method merged into the frozen base: dense changes by weight name, to be added before the adapter."""


def write_served(folder: RunFolder, model: Model, method: Method, state: State) -> str | None:
    """The served model as `adapter/` (PEFT) or, for a space that PEFT does not have, as `model/`; its folder's name.

    None when the method serves no single model, or none at all. Modules that stand side by side go to `modules/`.
    """
    for name, module in method.modules(state).items():
        with folder.replacing(f"modules/{safe(name)}") as temp:
            write_tree(temp, model, module, None)
    theta, base = method.served(state) if method.serves else ({}, None)
    if not theta:
        return None
    kind = "adapter" if model.space.peft_config(model.net, model.task) is not None else "model"
    with folder.replacing(kind) as temp:
        write_tree(temp, model, theta, base)
    return kind


def write_tree(folder: Path, model: Model, theta: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
    """One set of trainables in this folder, as an adapter where PEFT has the space and merged where not."""
    if model.space.peft_config(model.net, model.task) is None:
        save_merged(folder, model, theta, base)
        return
    save_adapter(folder, model, theta, resolve(model.name))
    reread(folder, model, theta)
    if base:
        save_file({n: t.detach().cpu().contiguous() for n, t in base.items()}, folder / BASE)


def write_clients(folder: RunFolder, model: Model, memory: Mapping[str, Mapping[str, Any]]) -> int:
    """`clients/<id>/` for each client with a memory: adapters where it holds trainables, plain tensors otherwise."""
    names = set(model.initial())
    for client, kept in memory.items():
        if not kept:
            continue
        with folder.replacing(f"clients/{safe(client)}") as temp:
            _write_memory(temp, model, kept, names)
    return sum(bool(kept) for kept in memory.values())


def _write_memory(folder: Path, model: Model, kept: Mapping[str, Any], names: set[str]) -> None:
    rest: dict[str, Any] = {}
    for key, value in kept.items():
        if isinstance(value, Mapping) and set(value) == names:
            (folder / key).mkdir()
            write_tree(folder / key, model, value, None)
        else:
            rest[key] = value
    flat = dict(leaves(rest))
    if tensors := {n: t.detach().cpu().contiguous() for n, t in flat.items() if isinstance(t, Tensor)}:
        save_file(tensors, folder / "memory.safetensors")
    plain = {n: v for n, v in flat.items() if not isinstance(v, Tensor)}
    if plain:
        (folder / "memory.json").write_text(json.dumps(plain, indent=2, default=str))


def safe(client: str) -> str:
    """A client's id as a folder name."""
    return "".join(c if c.isalnum() or c in "-_.@" else "_" for c in client).lstrip(".") or "_"

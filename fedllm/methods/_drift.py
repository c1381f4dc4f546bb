"""A base that drifts: what some methods merge into the frozen weights, kept in step at server and clients.

The server's state holds `drift` (dense, {weight: [o, i]}), `version` (how often it grew), `last` (what it grew by, as
factors) and `at` (the version that each client is known to hold).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload, Tree, pack, part

Stacks = Mapping[str, Tensor]
"""`B/<path>` and `A/<path>`, or `product/<path>`: what `fedllm.methods._factors.stacks` gives."""


def grow(drift: Tree, stacks: Stacks) -> Tree:
    """drift + B A for every module; a tree of its own."""
    b, a = part(stacks, "B"), part(stacks, "A")
    steps = part(stacks, "product") | {path: torch.empty(0) for path in b}
    out = {}
    for path, step in steps.items():
        before = drift.get(f"{path}.weight")  # [o, i]
        if path not in b:
            out[f"{path}.weight"] = step.clone() if before is None else before + step
        elif before is None:
            out[f"{path}.weight"] = b[path] @ a[path]
        else:
            out[f"{path}.weight"] = torch.addmm(before, b[path], a[path])
    return out


def shared(drift: Tree) -> Tree:
    """The same tree; called through `client.once`, so that clients with equal drifts hold one copy of it."""
    return drift


def start() -> dict[str, Any]:
    """The drift's part of a server's first state."""
    return {"drift": {}, "version": 0, "last": {}, "at": {}}


def news(state: Mapping[str, Any], client: str, dense: bool = False) -> dict[str, Any]:
    """What this client must be told to hold the drift: the last step if it holds all before, else the whole drift."""
    version, at = state["version"], state["at"].get(client, 0)
    if at == version - 1 and not dense:
        return pack(version=version, last=state["last"])
    return pack(version=version, drift=state["drift"]) if at != version else pack(version=version)


def grown(state: Mapping[str, Any], stacks: Stacks, answered: Sequence[str]) -> dict[str, Any]:
    """The drift's part of the next state, after a round in which these clients answered."""
    version = state["version"]
    return {"drift": grow(state["drift"], stacks), "version": version + 1, "last": dict(stacks),
            "at": {**state["at"], **dict.fromkeys(answered, version)}}


def held(client: Any, msg: Payload) -> Tree | None:
    """The client's drift after this message, remembered for the next one; None while there is none."""
    drift, version = client.memory.get("drift", {}), client.memory.get("version", 0)
    if whole := part(msg, "drift"):
        drift = client.once(shared, whole)
    elif version != msg["version"]:
        if version != msg["version"] - 1 or not (last := part(msg, "last")):
            raise PayloadError(f"client '{client.id}' holds version {version} of the base, which the message cannot "
                               f"bring to version {msg['version']}; its memory was lost or is another run's")
        drift = client.once(grow, drift, last)
    elif drift:
        drift = client.once(shared, drift)  # after a restart every client has a copy of its own
    client.memory["drift"], client.memory["version"] = drift, msg["version"]
    return drift or None

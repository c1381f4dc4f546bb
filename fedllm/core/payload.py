"""What crosses the wire: a flat mapping of names to tensors, numbers, text, bytes or lists.

A *tree* here is a flat `dict[str, Tensor]` with module-like names. `pack` puts several trees and scalars into one
payload ("theta/model.layers.0..." beside "n"); `part` takes one of them out again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError

Payload = Mapping[str, Any]
Tree = dict[str, Tensor]


class Kept(dict[str, Tensor]):
    """A tree that stays where it was made: `pack` refuses it. An optimizer's moments tell as much as gradients do."""


def pack(**parts: Any) -> dict[str, Any]:
    """One payload from named trees and scalars: `pack(theta=tree, n=5)` has keys `theta/<name>` and `n`."""
    out: dict[str, Any] = {}
    for name, value in parts.items():
        if isinstance(value, Kept):
            raise PayloadError(f"'{name}' is an optimizer's state, which stays at its client: keep it in client.memory")
        if isinstance(value, Mapping):
            out.update({f"{name}/{key}": leaf for key, leaf in value.items()})
        elif value is not None:
            out[name] = value
    return out


def part(payload: Payload, name: str) -> dict[str, Any]:
    """The tree that was packed under `name`; empty when there is none."""
    head = name + "/"
    return {key[len(head) :]: leaf for key, leaf in payload.items() if key.startswith(head)}


def alike(msgs: Mapping[str, Payload]) -> Tree:
    """The float tensors that all of these messages hold alike."""
    first, *others = msgs.values() if msgs else [{}]
    return {k: v for k, v in first.items() if isinstance(v, Tensor) and v.is_floating_point()
            and all(o.get(k) is v or (isinstance(o.get(k), Tensor) and v.equal(o[k])) for o in others)}


def tree_map(f: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Tree:
    """Apply `f` leaf by leaf; all trees must have the first one's names."""
    first = trees[0]
    for other in trees[1:]:
        if other.keys() != first.keys():
            odd = sorted(first.keys() ^ other.keys())[:3]
            raise PayloadError(f"trees differ in names, for example {odd}")
    return {key: f(*(tree[key] for tree in trees)) for key in first}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> Tree:
    """a + alpha * b, in the types of `a`."""
    return tree_map(lambda x, y: torch.add(x, y, alpha=alpha).to(x.dtype), a, b)


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a - b."""
    return tree_map(torch.sub, a, b)


def scale(a: Mapping[str, Tensor], by: float) -> Tree:
    """by * a."""
    return tree_map(lambda x: x * by, a)


def zeros_like(a: Mapping[str, Tensor]) -> Tree:
    """A tree of zeros of the same shapes and types."""
    return tree_map(torch.zeros_like, a)


def norm(a: Mapping[str, Tensor]) -> float:
    """L2 norm over all leaves, accumulated in fp64."""
    return sum(float(x.double().pow(2).sum()) for x in a.values()) ** 0.5


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested mapping with its '/'-joined path, in name order."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from leaves(value[key], f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, value


def digest(state: Any) -> str:
    """sha256 over a state's tensors (name, type, shape, bytes) in name order; other leaves enter as text."""
    h = hashlib.sha256()
    for path, leaf in leaves(state):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous()
            h.update(f"{path}|{flat.dtype}|{tuple(flat.shape)}|".encode())
            h.update(flat.reshape(-1).view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            h.update(f"{path}|{leaf!r}|".encode())
    return h.hexdigest()


def tensor_bytes(payload: Payload) -> int:
    """Bytes of the tensors alone, without names and framing (what papers count)."""
    return sum(v.numel() * v.element_size() for v in payload.values() if isinstance(v, Tensor))


def length(payload: Payload) -> float:
    """L2 norm over all floating-point tensors, as fp32 counts it: infinite where one holds an infinity, or NaN."""
    norms = [torch.linalg.vector_norm(v.detach().float()) for v in payload.values()
             if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    return float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms]))) if norms else 0.0


def non_finite(payload: Payload) -> str | None:
    """The first key whose value holds a NaN or an infinity, or None."""
    for key, v in payload.items():
        if not _all_finite(v):
            return key
    return None


def _all_finite(v: Any) -> bool:
    if isinstance(v, Tensor):
        return not v.is_floating_point() or bool(torch.isfinite(v).all())
    if isinstance(v, list | tuple):
        return all(map(_all_finite, v))
    return not isinstance(v, float) or math.isfinite(v)

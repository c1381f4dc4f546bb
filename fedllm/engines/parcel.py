"""Values on their way between processes of one Ray cluster: each tensor once, as plain bytes beside the rest.

A tensor that is a slice of a stack [K, ...] would otherwise take the whole stack along, K times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Stands where tensor number `at` was."""

    at: int


@dataclass(frozen=True)
class Parcel:
    """`value` with its tensors taken out: (dtype, shape, bytes) of each, which Ray carries without a copy."""

    value: Any
    tensors: list[tuple[torch.dtype, tuple[int, ...], np.ndarray]]


def wrap(value: Any) -> Parcel:
    """Take the tensors out of nested mappings, lists and tuples; the same tensor twice stays one tensor."""
    seen: dict[int, tuple[Slot, Tensor]] = {}  # holding the tensor keeps its id from being used again
    out: list[tuple[torch.dtype, tuple[int, ...], np.ndarray]] = []

    def take(v: Any) -> Any:
        if isinstance(v, Tensor):
            if id(v) not in seen:
                seen[id(v)] = Slot(len(out)), v
                flat = v.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                out.append((v.dtype, tuple(v.shape), flat.numpy()))
            return seen[id(v)][0]
        if isinstance(v, Mapping):
            return {k: take(x) for k, x in v.items()}
        if type(v) in (list, tuple):
            return type(v)(take(x) for x in v)
        return v

    return Parcel(take(value), out)


def unwrap(parcel: Parcel) -> Any:
    """The value again; its tensors may be written to."""
    tensors = [torch.from_numpy(raw.copy()).view(dtype).view(shape) if raw.size else torch.empty(shape, dtype=dtype)
               for dtype, shape, raw in parcel.tensors]

    def give(v: Any) -> Any:
        if isinstance(v, Slot):
            return tensors[v.at]
        if isinstance(v, dict):
            return {k: give(x) for k, x in v.items()}
        if type(v) in (list, tuple):
            return type(v)(give(x) for x in v)
        return v

    return give(parcel.value)

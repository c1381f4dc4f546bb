"""Terms that a method adds to a client's loss, on the trainables rather than on the data."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedllm.core.payload import Tree


class Term(Protocol):
    """A penalty on the trainables. Lanes with equal `key` run in one step, their `tensors` stacked like theta."""

    tensors: Tree

    @property
    def key(self) -> Hashable: ...

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """Stacked trainables and tensors [K, ...] -> penalty of each lane [K]."""
        ...


@dataclass(frozen=True)
class Proximal:
    """mu/2 * ||theta - anchor||^2 (FedProx)."""

    mu: float
    tensors: Tree

    @property
    def key(self) -> Hashable:
        return ("proximal", self.mu)

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * self.mu * sum_lanes({n: (theta[n] - tensors[n]).pow(2) for n in tensors if n in theta})


@dataclass(frozen=True)
class Linear:
    """<theta, g>: adds the fixed vector g to the gradient (SCAFFOLD's correction c - c_k)."""

    tensors: Tree

    @property
    def key(self) -> Hashable:
        return ("linear",)

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return sum_lanes({n: theta[n] * tensors[n] for n in tensors if n in theta})


def sum_lanes(tree: Mapping[str, Tensor]) -> Tensor:
    """Sum everything but the leading K: {name: [K, ...]} -> [K]."""
    return torch.stack([t.flatten(1).sum(1) for t in tree.values()]).sum(0)

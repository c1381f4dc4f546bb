"""Named tensors end to end in one piece of shared memory, which the processes of one machine read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.payload import Tree

STEP = 64
"""Where a tensor begins: at a multiple of so many bytes."""


@dataclass(frozen=True)
class Blob:
    """The bytes, and where in them each tensor lies."""

    data: Tensor
    places: Sequence[tuple[str, torch.dtype, tuple[int, ...], int]]

    @classmethod
    def of(cls, trees: Mapping[str, Mapping[str, Tensor]]) -> Blob:
        """A copy of these trees, each under its name."""
        places, at = [], 0
        for owner, tree in trees.items():
            for name, t in tree.items():
                places.append((f"{owner}/{name}", t.dtype, tuple(t.shape), at))
                at += -(-t.numel() * t.element_size() // STEP) * STEP
        made = cls(torch.empty(max(1, at), dtype=torch.uint8).share_memory_(), places)
        for owner, tree in trees.items():
            for name, view in made.under(owner).items():
                view.copy_(tree[name])
        return made

    def under(self, owner: str) -> Tree:
        """The tree of this name: tensors that lie in the shared memory itself."""
        out: Tree = {}
        for key, dtype, shape, at in self.places:
            if key.startswith(f"{owner}/"):
                size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
                out[key.removeprefix(f"{owner}/")] = self.data[at : at + size].view(dtype).view(shape)
        return out

"""Two bottleneck adapters side by side in each block: one that all share, and one of the client's own (FedDAT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree, pack
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.space import Stack

SHARED, OWN = "shared", "own"
LEAVES = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True)
class DualAdapter(Adapter):
    """h + up(relu(down(h))) of the adapter in the tree; of both, h + gate u_own + (1 - gate) u_shared.

    A tree that holds `shared/<path>` alone runs with it as an ordinary adapter, so the same network has both modes.
    """

    gate: float = knob(0.5, "part of the own adapter where both are there", ge=0, le=1)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree = super().start(net, rng, rank)
        mine = {n: x for n, x in tree.items() if ".adapter_" in n}
        other = {n: x for n, x in super().start(net, rng, rank).items() if n in mine}
        return pack(shared=mine, own=other) | {n: x for n, x in tree.items() if n not in mine}

    def place(self, name: str) -> str:
        head, _, rest = name.partition("/")
        return rest if head in (SHARED, OWN) else name

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return False

    def _adapted(self, frozen: Any, path: str, stack: Stack) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            whole = frozen(*args, **kwargs)
            there = [kind for kind in (OWN, SHARED) if f"{kind}/{path}.adapter_down.weight" in stack.tensors]
            if not there:
                return whole
            h = whole[0] if isinstance(whole, tuple) else whole
            parts = [self.gate, 1 - self.gate] if len(there) == 2 else [1.0]
            y = h
            for kind, part in zip(there, parts, strict=True):
                y = y + part * self.bottleneck(h, f"{kind}/{path}", stack)
            return (y, *whole[1:]) if isinstance(whole, tuple) else y

        return forward

    def bottleneck(self, h: Tensor, path: str, stack: Stack) -> Tensor:
        """up(relu(down(h)))."""
        down, down_b, up, up_b = (stack.tensors[f"{path}.adapter_{leaf}"].to(h.dtype) for leaf in LEAVES)
        z = F.relu(torch.baddbmm(down_b[:, None], stack.lanes(h), down.mT))
        return torch.baddbmm(up_b[:, None], z, up.mT).reshape(h.shape)

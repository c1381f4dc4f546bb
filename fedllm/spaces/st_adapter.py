"""Bottleneck adapters that look along the sequence: a depth-wise convolution in the bottleneck (ST-Adapter, 2022)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import DataError, ModelError, RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.space import Stack


@dataclass(frozen=True)
class STAdapter(Adapter):
    """h + up(relu(conv(down(h)))), the convolution depth-wise over (time, height, width); `up` starts at zero.

    Without a `grid` the tokens are a line in time, padding counts as zeros, and in a language model the kernel looks
    back only. With one, a row holds `skip` tokens (a class token) and then grid[0] * grid[1] * grid[2] places.
    """

    kernel: tuple[int, ...] = knob((3, 1, 1), "odd extents in time, height and width")
    grid: tuple[int, ...] | None = knob(None, "frames, rows and columns of each sample; None: a line of any length")
    skip: int = knob(0, "leading tokens that lie outside of the grid and are adapted token by token", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, odd in (("kernel", self.kernel, True), ("grid", self.grid, False)):
            fine = isinstance(value, Sequence) and len(value) == 3 and all(
                type(x) is int and x >= 1 and (x % 2 or not odd) for x in value)
            if value is not None and not fine:
                raise RecipeError(f"STAdapter.{name} = {value!r} is not allowed; it must be three "
                                  f"{'odd ' if odd else ''}whole numbers from 1: time, height, width")
        if self.grid is None and tuple(self.kernel[1:]) != (1, 1):
            raise RecipeError(f"STAdapter.kernel = {self.kernel!r} looks along height or width; give the grid too")

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree, m = super().start(net, rng, rank), self.size
        for path in self._sites(net):
            w = torch.rand(m, *self.kernel, generator=rng) * 2 - 1
            tree[f"{path}.adapter_conv.weight"] = w / math.sqrt(math.prod(self.kernel))
            tree[f"{path}.adapter_conv.bias"] = torch.zeros(m)
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        if self.grid is not None and stack.causal:
            raise ModelError(f"st_adapter: space.grid = {self.grid!r} needs an encoder with a classifier; in a "
                             "language model leave the grid out")
        return super().install(net, stack)

    def inner(self, z: Tensor, path: str, stack: Stack, rows: int) -> Tensor:
        w, b = (stack.tensors[f"{path}.adapter_conv.{p}"].to(z.dtype) for p in ("weight", "bias"))
        z = z.view(stack.k, rows, -1, z.shape[-1])  # [K, B, L, m]
        if stack.mask is not None:
            z = z * stack.mask.view(*z.shape[:3], 1)  # padding is zero, as is what lies beyond the ends
        front, z = z[:, :, : self.skip], z[:, :, self.skip :]
        grid = tuple(self.grid or (z.shape[2], 1, 1))
        if z.shape[2] != math.prod(grid):
            raise DataError(f"space.grid = {grid!r} has {math.prod(grid)} places after space.skip = {self.skip}; these "
                            f"rows have {z.shape[2] + self.skip} tokens")
        z = depthwise(self._ends(z.unflatten(2, grid), path, stack), w, grid) + b[:, None, None, None, None]
        return F.relu(torch.cat([front, z.flatten(2, 4)], 2)).flatten(1, 2)

    def _ends(self, z: Tensor, path: str, stack: Stack) -> Tensor:
        """z [K, B, T, H, W, m] with what lies before, behind and beside it: zeros, or the tokens said before."""
        t, h, w = (k // 2 for k in self.kernel)
        if not stack.causal:
            return F.pad(z, (0, 0, w, w, h, h, t, t))
        if stack.past is None:
            return F.pad(z, (0, 0, 0, 0, 0, 0, 2 * t, 0))
        before = stack.past.get(path, z.new_zeros(*z.shape[:2], 2 * t, *z.shape[3:]))
        z = torch.cat([before, z], 2)
        stack.past[path] = z[:, :, z.shape[2] - 2 * t :]
        return z


def depthwise(z: Tensor, w: Tensor, grid: Sequence[int]) -> Tensor:
    """Each channel with its own kernel, as one product a tap: z [K, B, T + t - 1, H + h - 1, W + w - 1, m] and kernels
    w [K, m, t, h, w] -> [K, B, T, H, W, m]."""
    frames, height, width = grid
    out: Tensor | float = 0.0
    for t, h, x in itertools.product(*map(range, w.shape[2:])):
        seen = z[:, :, t : t + frames, h : h + height, x : x + width]
        out = out + seen * w[:, None, None, None, None, :, t, h, x]
    return out  # type: ignore[return-value]

"""The RMS norm and the gated MLP of Llama-like blocks, with backward passes that keep less than torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.spaces.frozen import at_once

PART = 512
"""Tokens that a gated MLP takes at once."""


class SwiGlu(torch.autograd.Function):
    """silu(g) u; keeps g and u alone."""

    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d * u, g), F.silu(g).mul_(d)


class GatedMlp(torch.autograd.Function):
    """(silu(x G^T) * x U^T) D^T with frozen G, U [o, i] and D [i, o]; keeps the two products, and no third."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = F.linear(x, gate), F.linear(x, up)
        ctx.save_for_backward(g, u, gate, up, down)
        y = torch.empty_like(x)
        for out, a, b in zip(_parts(y), _parts(g), _parts(u), strict=True):
            torch.mm(F.silu(a).mul_(b), down.T, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        g, u, gate, up, down = ctx.saved_tensors
        dx = torch.empty_like(d, memory_format=torch.contiguous_format)
        size = min(PART, at_once(d))
        for out, a, b, e in zip(*(_parts(x, size) for x in (dx, g, u, d)), strict=True):
            e = e @ down
            right = F.silu(a).mul_(e)
            torch.mm(torch.ops.aten.silu_backward(e.mul_(b), a), gate, out=out)
            out.addmm_(right, up)
        return dx, None, None, None


def _parts(x: Tensor, size: int = PART) -> tuple[Tensor, ...]:
    """[..., d] as pieces [m, d] of it, few enough rows that what is made of them stays in the cache."""
    return x.reshape(-1, x.shape[-1]).split(size)


class RmsNorm(torch.autograd.Function):
    """w * x / rms(x) with a frozen gain w; keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, None, None]:
        # dx = r (w d) - x r^3 mean(x w d)
        x, weight, scale = ctx.saved_tensors
        g, wide = (d * weight).to(scale.dtype), x.to(scale.dtype)
        along = (g * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return g.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None

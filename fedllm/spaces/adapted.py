"""A linear map beside which LoRA's factors of K lanes lie, and the quick form of both together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedllm.spaces.dropout import dropped
from fedllm.spaces.factors import names_of
from fedllm.spaces.frozen import back
from fedllm.spaces.magnitude import MAGNITUDE, turned
from fedllm.spaces.principal import principal, with_start
from fedllm.spaces.space import PEFT, Stack
from fedllm.spaces.twice import wanted


def adapted(frozen: Any, path: str, module: nn.Module, stack: Stack, space: Any) -> Any:
    """The forward of `module` under these trainables; `space` is the LoRA whose they are."""
    (b_name, a_name), w_name = names_of(path), f"{path}.weight"

    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in module.__dict__  # no other stream beneath

    def forward(x: Tensor) -> Tensor:
        a = stack.tensors.get(a_name)  # [K, r, i]
        drift = stack.base.get(w_name) if stack.base else None
        seen = x if a is None else dropped(x, space.dropout, path, stack)  # what the update is given
        if a is not None:
            a, b = a.to(x.dtype), stack.tensors[b_name].to(x.dtype)
            scale: Any = stack.extra["lora_scale"]
            one = len(set(scale)) == 1
            scale = scale[0] if one else torch.tensor(scale, dtype=x.dtype, device=x.device)[:, None, None]
            if space.init == "pissa" and seen is x:
                a, b = with_start(a, b, module, scale)
            if plain and drift is None and stack.quick and seen is x and not space.dora and not wanted():
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                return Adapted.apply(x, weight, module.bias, a, b, scale)
        y = frozen(x) if drift is None else frozen(x) + F.linear(x, drift.to(x.dtype))
        if a is None:
            return y
        h = torch.bmm(stack.lanes(seen), a.mT) * scale  # [K, N, r]
        if space.dora:
            m, off = stack.tensors[f"{PEFT}{path}{MAGNITUDE}"], None if seen is x else stack.lanes(seen)
            return turned(module, stack.lanes(y), torch.bmm(h, b.mT), off, m, a, b, scale).view(y.shape)
        if space.init == "pissa" and seen is not x:
            p, q = (m.to(x) for m in principal(module, a.shape[1]))
            y = y - F.linear(F.linear(x, q), p)
        return torch.baddbmm(stack.lanes(y), h, b.mT).view(y.shape)

    return forward


class Adapted(torch.autograd.Function):
    """x W^T + bias + s x A_k^T B_k^T for K lanes, W frozen: x [K*n, ..., i], W [o, i], A [K, r, i], B [K, o, r].

    Thin products are written with the rank as the number of rows, which runs up to three times as fast, and wide
    results are added to in place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any) -> Tensor:
        y = F.linear(x, weight, bias)
        lanes = x.reshape(len(a), -1, x.shape[-1])  # [K, N, i]
        ht = torch.bmm(a, lanes.mT).mul_(scale)  # [K, r, N]
        y.view(len(a), -1, y.shape[-1]).baddbmm_(ht.mT, b.mT)
        ctx.save_for_backward(lanes, weight, a, b, ht)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        lanes, weight, a, b, ht = ctx.saved_tensors
        wide = d.reshape(len(a), -1, d.shape[-1])  # [K, N, o]
        dh = torch.bmm(b.mT, wide.mT).mul_(ctx.scale)  # [K, r, N]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = back(d, weight)  # [K*n, ..., i]
            dx.view(lanes.shape).baddbmm_(dh.mT, a)
        da = torch.bmm(dh, lanes) if ctx.needs_input_grad[3] else None
        db = torch.bmm(ht, wide).mT if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None

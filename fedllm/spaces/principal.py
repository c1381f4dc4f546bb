"""PiSSA: LoRA that begins at the principal part of each weight, which is taken out of what stays frozen.

The base itself is left as it is: y = W x + s B A x - P Q x with s B A = P Q at the start, so that a model without
trainables is the plain one, and no rounding of W - P Q to the base's type is lost (Meng et al., NeurIPS 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from fedllm.core.errors import ModelError

_FOUND: Any = WeakTensorKeyDictionary()
"""Weight -> (its version, P, Q) at the largest rank that was asked for."""


def principal(module: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """P [o, r] = U sqrt(S) and Q [r, i] = sqrt(S) V of the weight's largest singular values, in fp32 or better."""
    weight: Any = module.weight
    version, p, q = _FOUND.get(weight, (-1, None, None))
    if version != weight._version or p.shape[1] < rank:
        with torch.no_grad():
            w = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
            u, s, v = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
            root = s[:rank].sqrt()
            p, q = (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()
        _FOUND[weight] = (weight._version, p, q)
    return p[:, :rank], q[:rank]


def with_start(a: Tensor, b: Tensor, module: nn.Module, scale: float) -> tuple[Tensor, Tensor]:
    """Factors A [..., 2r, i] and B [..., o, 2r] of s B A - P Q at the scale s: what PEFT calls a converted adapter."""
    p, q = (x.to(a) / scale**0.5 for x in principal(module, a.shape[-2]))
    return torch.cat([a, q.expand(*a.shape[:-2], *q.shape)], -2), torch.cat([b, -p.expand(*b.shape[:-2], *p.shape)], -1)


def without_start(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """A and B of a converted adapter again, given how they began; ModelError for an adapter that began otherwise."""
    r, start = len(a0), b0 @ a0
    off = (b[:, r:] @ a[r:]).to(start) + start if len(a) == 2 * r else start
    if float(off.abs().max()) > 1e-3 * float(start.abs().max()):
        raise ModelError(f"the adapter of '{path}' did not begin as space.init = 'pissa' at rank {r} on this base; "
                         "leave space.init out to go on with it as an ordinary LoRA")
    return a[:r], b[:, :r]

"""DoRA: the direction of each weight's rows learned by LoRA, and their lengths by a vector (Liu et al., ICML 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MAGNITUDE = ".lora_magnitude_vector"


def weight_of(module: nn.Module) -> Tensor:
    """[o, i], whichever way it lies."""
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: Any) -> Tensor:
    """||W + s B A|| of each row [K, o], for A [K, r, i] and B [K, o, r]; no [o, i] for each of K lanes is made.

    ||w + s b A||^2 = ||w||^2 + 2 s b A w + s^2 b A A^T b. As in the paper no gradient passes through it.
    """
    with torch.no_grad():
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        a, b = a.to(w.dtype), b.to(w.dtype)
        cross = (torch.matmul(w, a.mT) * b).sum(-1)  # [K, o]
        own = (torch.bmm(b, torch.bmm(a, a.mT)) * b).sum(-1)
        s = scale[..., 0] if isinstance(scale, Tensor) else scale
        return (w.pow(2).sum(1) + 2 * s * cross + s * s * own).clamp_(min=0).sqrt()


def turned(module: nn.Module, y: Tensor, change: Tensor, dropped: Tensor | None, magnitude: Tensor, a: Tensor,
           b: Tensor, scale: Any) -> Tensor:
    """y = W x + bias and LoRA's own `change` s B A x, as DoRA has them: bias + g (W x + s B A x), all [K, N, o].

    g = m / ||W + s B A||, with the magnitudes m [K, o]. With dropout the update sees the dropped input x' [K, N, i]:
    y + (g - 1) W x' + g s B A x', as in PEFT.
    """
    gain = (magnitude / lengths(weight_of(module), a, b, scale)).to(y.dtype)[:, None]  # [K, 1, o]
    if dropped is not None:
        return y + (gain - 1) * (dropped @ weight_of(module).T) + gain * change
    bias: Any = module.bias
    return gain * (y + change) if bias is None else gain * (y - bias + change) + bias

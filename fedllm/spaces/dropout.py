"""Dropout of an adapter's input while a client trains, drawn from that client's own stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedllm.spaces.space import Stack


def dropped(x: Tensor, p: float, path: str, stack: Stack) -> Tensor:
    """x with a share p of its entries zeroed and the others scaled up, while a client trains; x itself otherwise."""
    noise: Any = stack.noise
    if not p or noise is None or not torch.is_grad_enabled():
        return x
    return x * ((noise.uniform(path, x) >= p).to(x.dtype) / (1 - p))

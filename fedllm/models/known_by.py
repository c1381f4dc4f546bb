"""What a base model is known by."""

from __future__ import annotations

import hashlib
from typing import Any

from fedllm.core.payload import digest
from fedllm.models.quantized import scales


def base_digest(model: Any) -> str:
    """sha256 over the architecture and the frozen weights: what a signed base model is known by."""
    net = model.net
    trained = set(model.initial())
    frozen = {n: p for n, p in net.named_parameters() if n not in trained}
    kind = f"{type(net).__name__} {sorted((n, tuple(p.shape)) for n, p in net.named_parameters())}"
    return hashlib.sha256((kind + digest(frozen | scales(net))).encode()).hexdigest()

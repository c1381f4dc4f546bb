"""An encoder under a head of ours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last", "each"]


class HeadedEncoder(nn.Module):
    """An encoder body, a pooling of its last hidden states ("each": none), and a linear head."""

    def __init__(self, body: nn.Module, labels: int, pooling: Pooling) -> None:
        super().__init__()
        self.body, self.pooling = body, pooling
        self.classifier = nn.Linear(body.config.hidden_size, labels)
        self.config = body.config

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def pool(self, h: Tensor, mask: Tensor) -> Tensor:
        """[N, T, d], [N, T] -> [N, d], or as they are."""
        if self.pooling == "each":
            return h
        if self.pooling == "cls":
            return h[:, 0]
        if self.pooling == "last":
            return h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
        m = mask.to(h.dtype)[..., None]
        return (h * m).sum(1) / m.sum(1)

"""Attention over an image-text model's image features (FedCLIP): 2 (d^2 + d) numbers, and both towers frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.spaces.params import Params


@dataclass(frozen=True)
class FeatureAttention(Params):
    """Train `attend`, and nothing else."""

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        return name.startswith("attend.")

    def chosen(self, net: nn.Module) -> dict[str, nn.Parameter]:
        found = {n: p for n, p in net.named_parameters() if self.picks(net, n, p)}
        if not found:
            raise ModelError("space 'feature_attention' weighs the image features of an image-text model; with this "
                             "one 'lora' works (data.task = 'image_text' loads image-text models)")
        return found

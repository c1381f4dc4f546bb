"""Full fine-tuning: every parameter of the network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedllm.spaces.params import Params


@dataclass(frozen=True)
class Full(Params):
    """Train everything."""

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        return True

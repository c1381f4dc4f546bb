"""BitFit: only the bias vectors (Ben Zaken et al., ACL 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.spaces.params import Params


@dataclass(frozen=True)
class Bias(Params):
    """Train every bias, the norms' shifts included, and the classifier where there is one."""

    head: bool = knob(True, "train the classification head too")

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        return name.rsplit(".", 1)[-1] == "bias" or (self.head and name.startswith("classifier."))

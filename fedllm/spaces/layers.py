"""Layer subset: some blocks of the network, whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.spaces.params import Params


@dataclass(frozen=True)
class Layers(Params):
    """Train the blocks whose index is listed (negative counts from the end), and the classifier where there is one."""

    layers: tuple[int, ...] = knob((-1,), "indices of the blocks to train; -1 is the last")
    head: bool = knob(True, "train the classification head too")

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        if self.head and name.startswith("classifier."):
            return True
        index = block_of(name)
        depth = 1 + max((i for n, _ in net.named_parameters() if (i := block_of(n)) is not None), default=-1)
        return index is not None and index in [i % depth for i in self.layers if -depth <= i < depth]


def block_of(name: str) -> int | None:
    """The index of the block that a parameter belongs to, or None outside the blocks."""
    found = re.search(r"\.(?:layers|layer|h|blocks)\.(\d+)\.", "." + name)
    return int(found.group(1)) if found else None

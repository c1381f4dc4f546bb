"""Full training in which a tower's linear maps also see the other tower's: W_eff = W + s W_aux (FedCola)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.core.payload import Tree
from fedllm.spaces.params import Params, with_ties
from fedllm.spaces.space import Stack, set_params
from fedllm.spaces.stacked import install_params

SCALE, AUX = "scale.", "aux."
"""Before a weight's name: s [1], 0 at the start, and W_aux, which a method hands out beside the trainables."""


@dataclass(frozen=True)
class Complement(Params):
    """Every parameter, and an s for each matrix in a block of `image` or `text` that has a twin in the other."""

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        return True

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        theta = super().start(net, rng, rank)
        return {**theta, **{SCALE + n: t.new_zeros(1) for n, t in theta.items()
                            if t.dim() == 2 and (w := theta.get(twin(n) or "")) is not None and w.shape == t.shape}}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        def value(name: str) -> Tensor | None:
            w, s, aux = (stack.tensors.get(head + name) for head in ("", SCALE, AUX))
            return w if w is None or s is None or aux is None else w + s[..., None] * aux

        return install_params(net, stack, with_ties(net, self.chosen(net)), value)

    def trains(self, name: str) -> bool:
        return not name.startswith((SCALE, AUX))

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return super().idle(net, merged(theta))

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        set_params(net, merged(theta))


def twin(name: str) -> str | None:
    """The weight in the other tower that stands where this one does; None outside of blocks."""
    for a, b in (("image.blocks.", "text.blocks."), ("text.blocks.", "image.blocks.")):
        if name.startswith(a):
            return b + name.removeprefix(a)
    return None


def merged(theta: Mapping[str, Tensor]) -> Tree:
    """The weights with s W_aux in them, where W_aux is there."""
    return {n: t + theta[SCALE + n] * theta[AUX + n] if SCALE + n in theta and AUX + n in theta else t
            for n, t in theta.items() if not n.startswith((SCALE, AUX))}

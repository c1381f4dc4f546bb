"""Packed linear maps that are unpacked one at a time, each for the time of its own product.

The examination's plain network is made of them (`Unpacking`), so that it takes one map's memory beside what is
packed. An int8 base multiplies so itself (`weights_alone`): bitsandbytes would also round what goes in, token by token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KINDS = ("Linear4bit", "Linear8bitLt", "Linear8Alone")


def packed(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules whose weights are packed."""
    return ((path, m) for path, m in net.named_modules() if type(m).__name__ in KINDS)


def unpacked(module: Any) -> Tensor:
    """The weight [o, i] that a packed module multiplies by, in fp32."""
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    state = module.state
    rows, scale = (weight.data, weight.SCB) if state.CB is None else (state.CB, state.SCB)
    return rows.float() * (scale.float() / 127.0)[:, None]


def product(x: Tensor, make: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """x W^T + bias with the W that `make` makes: now, and once more in the backward pass, so that nobody keeps it."""
    def once(x: Tensor) -> Tensor:
        return F.linear(x, make().to(x.dtype), bias)

    return checkpoint(once, x, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else once(x)


@functools.cache
def alone() -> Any:
    """bitsandbytes' int8 map whose weights alone are rounded, and nothing that goes in."""
    from bitsandbytes.nn import Linear8bitLt

    class Linear8Alone(Linear8bitLt):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return product(x, lambda: unpacked(self), self.bias)

    return Linear8Alone


def weights_alone(module: Any) -> None:
    """Let this int8 map multiply by its weights as they are unpacked; it stays what it is otherwise."""
    module.__class__ = alone()


class Unpacking(nn.Linear):
    """y = W x + bias, with W made anew from its packed form in the forward pass and once more in the backward pass.

    In the place of `weight` may stand what makes another one (`plain.put_in`); gradients flow into that.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = module.in_features, module.out_features, dtype
        self.__dict__["packed"] = module  # no part of the network that a copy would take along
        self._parameters["weight"], self._parameters["bias"] = None, module.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """As it is packed, in the network's type."""
        return unpacked(self.__dict__["packed"]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        made: Any = self._parameters["weight"]
        return product(x, (lambda: self.weight) if made is None else made, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpacking:
        made = Unpacking(self.__dict__["packed"], self.dtype)
        made._parameters["bias"] = copy.deepcopy(self.bias, memo)
        return made


def unpacking(net: Any) -> Any:
    """The network, whose forwards are its own, with each packed map as an `Unpacking`."""
    for path, module in list(packed(net)):
        parent, _, leaf = path.rpartition(".")
        net.get_submodule(parent)._modules[leaf] = Unpacking(module, net.dtype)
    return net

"""Spaces that train some of the network's own parameters: which ones is all that they differ in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack
from fedllm.spaces.stacked import install_params


class Params(Space):
    """A subset of the network's parameters, replaced by trainables; names are the network's own."""

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        """Whether this parameter is trained."""
        raise NotImplementedError

    def chosen(self, net: nn.Module) -> dict[str, nn.Parameter]:
        """Trained parameters by name; tied ones once, under their first name."""
        found = {n: p for n, p in net.named_parameters() if self.picks(net, n, p)}
        if not found:
            raise ModelError(f"{type(self).__name__}: the model has no such parameters; try the space 'lora' or 'ia3'")
        return found

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        return {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
                for n, p in self.chosen(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        return install_params(net, stack, with_ties(net, self.chosen(net)))

    def trains(self, name: str) -> bool:
        return True


def with_ties(net: nn.Module, chosen: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Every path that leads to a chosen parameter -> the one name under which it is trained."""
    first = {id(p): n for n, p in chosen.items()}
    return {n: first[id(p)] for n, p in net.named_parameters(remove_duplicate=False) if id(p) in first}

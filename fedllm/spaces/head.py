"""Head only: the classifier, or the language-model head, on frozen features (linear probing)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.spaces.params import Params
from fedllm.spaces.space import linear_size, output_heads, tied_to


@dataclass(frozen=True)
class Head(Params):
    """Train the output head and nothing else."""

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        return name.rpartition(".")[0] in output_heads(net)

    def chosen(self, net: nn.Module) -> dict[str, nn.Parameter]:
        named = dict(net.named_parameters(remove_duplicate=False))
        picked = {n: p for n, p in named.items() if self.picks(net, n, p)}
        read = {id(p) for n, p in picked.items() if linear_size(net.get_submodule(n.rpartition(".")[0]))}
        found = {n: p for n, p in picked.items() if id(p) not in read or linear_size(net.get_submodule(
            n.rpartition(".")[0]))}  # a bias that lies beside its linear map too (RoBERTa) is one
        if not found:
            raise ModelError("head: the model has no output head named lm_head, classifier, score or embed_out")
        return found

    def install(self, net: nn.Module, stack) -> bool:  # a tied head is untied: the embedding below stays frozen
        from fedllm.spaces.stacked import install_params

        return install_params(net, stack, {n: n for n in self.chosen(net)})

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        untie(net)
        super().merge(net, theta)


def untie(net: Any) -> None:
    """Give output heads weights of their own."""
    for path in output_heads(net):
        if tied_to(net, f"{path}.weight"):
            head = net.get_submodule(path)
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            net.config.tie_word_embeddings = False


def classifier_start(module: nn.Linear, rng: torch.Generator) -> None:
    """Initialize a classifier with small random weights and no bias."""
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=rng) * 0.02)
        module.bias.zero_()

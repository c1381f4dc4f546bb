"""Spaces that train some of the network's own parameters: which ones is all that they differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack, named, output_heads, set_params, tied_to
from fedllm.spaces.stacked import install_params


class Params(Space):
    """A subset of the network's parameters, replaced by trainables; names are the network's own."""

    stays = ""
    by_token = True

    def picks(self, net: nn.Module, name: str, parameter: Tensor) -> bool:
        """Whether this parameter is trained."""
        raise NotImplementedError

    def chosen(self, net: nn.Module) -> dict[str, nn.Parameter]:
        """Trained parameters by name; tied ones once, under their first name."""
        found = {n: p for n, p in net.named_parameters() if self.picks(net, n, p)}
        if not found:
            raise ModelError(f"{self.stem}: the model has no such parameters; try the space 'lora' or 'ia3'")
        return found

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        return {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
                for n, p in self.chosen(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        return install_params(net, stack, with_ties(net, self.chosen(net)))

    def trains(self, name: str) -> bool:
        return True

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        weights = dict(net.named_parameters(remove_duplicate=False))
        return all(t.equal(weights[n].to(t)) for n, t in theta.items())

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        set_params(net, theta)


def with_ties(net: nn.Module, chosen: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Every path that leads to a chosen parameter -> the one name under which it is trained."""
    first = {id(p): n for n, p in chosen.items()}
    return {n: first[id(p)] for n, p in net.named_parameters(remove_duplicate=False) if id(p) in first}


def saved_params(net: nn.Module, modules: Sequence[str], trains: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """Parameters of the modules that are trained whole beside an adapter (`modules_to_save`).

    A module that the model lacks is refused, but for the classifier, which only encoders have; so is an output head
    that shares its weights with the embeddings, under whose name nothing of its own could be trained.
    """
    every = {n: p for n, p in net.named_parameters(remove_duplicate=False) if trains(n)}
    found = {n: p for n, p in net.named_parameters() if trains(n)}
    for m in modules:
        if m != "classifier" and not any(named(n.rpartition(".")[0], m) or f".{m}." in f".{n}" for n in every):
            raise ModelError(f"space.modules_to_save: the model has no module named {m!r}")
    for path in sorted({n.rpartition(".")[0] for n in every} & output_heads(net)):
        if f"{path}.weight" not in found and f"{path}.weight" in every:
            raise ModelError(f"space.modules_to_save: '{path}' shares its weights with "
                             f"'{tied_to(net, f'{path}.weight')}', so it is not trained by itself; leave it out, or "
                             "train the space 'head', which unties it")
    return found


def lookup_of(net: nn.Module) -> list[str]:
    """Names of the parameters along the vocabulary: the token embeddings, and the output head's where it is another."""
    model: Any = net
    head = model.get_output_embeddings()
    along = {id(model.get_input_embeddings().weight), *(id(p) for p in (head.parameters() if head else ()))}
    return [n for n, p in net.named_parameters() if id(p) in along]


def tables_of(net: nn.Module) -> set[str]:
    """Those, and the weights of all else that is looked up (positions, kinds of token)."""
    return {*lookup_of(net), *(f"{path}.weight" for path, m in net.named_modules() if isinstance(m, nn.Embedding))}

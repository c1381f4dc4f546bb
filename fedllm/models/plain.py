"""The network as transformers has it, and one client's trainables in it: what every quicker way must equal."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.core.payload import Tree
from fedllm.models.unpacking import Unpacking
from fedllm.spaces.head import Head
from fedllm.spaces.ia3 import IA3
from fedllm.spaces.lora import LoRA, factors
from fedllm.spaces.mask import Mask
from fedllm.spaces.params import Params, with_ties
from fedllm.spaces.space import PEFT


def unpatched(net: nn.Module) -> Any:
    """The same network on the very same weights, with every module's own forward."""
    kept = [v for m in net.modules() for v in m.__dict__.values() if isinstance(v, Tensor)]  # of recurrent layers
    states = [m.__dict__["state"] for m in net.modules() if "state" in m.__dict__]  # of packed weights
    held = {id(t): t for t in [*net.parameters(), *net.buffers(), *kept, *states]}
    bare = copy.deepcopy(net, held)
    for module in bare.modules():
        module.__dict__.pop("forward", None)
    return bare


def widened(net: nn.Module) -> Any:
    """A copy of the network with its own forwards, in fp32."""
    wide = copy.deepcopy(unpatched(net))
    for tensor in (*wide.parameters(), *wide.buffers()):  # transformers refuses `float()` to packed networks
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in wide.modules():
        if isinstance(module, Unpacking):
            module.dtype = torch.float32
    return wide


def plain_copy(net: Any, weights: Mapping[str, Tensor]) -> Any:
    """A network of transformers' of this kind on these weights, which does not know how they were kept before."""
    config = type(net.config).from_dict({k: v for k, v in net.config.to_dict().items() if k not in (
        "quantization_config", "_model_name_or_path")})
    with torch.device("meta"):
        made: Any = type(net)(config)
    for name, module in net._modules.items():
        if module is None:
            made._modules[name] = None
    made.load_state_dict(dict(weights), assign=True)
    made.tie_weights()
    for path, buffer in net.named_buffers():  # those that no checkpoint has: the angles of positions
        owner, _, leaf = path.rpartition(".")
        made.get_submodule(owner)._buffers[leaf] = buffer
    if net.can_generate():
        made.generation_config = net.generation_config
    return made.eval()


@contextlib.contextmanager
def swapped(net: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with these weights (by path; a tied one needs each of its paths) in the places of the network's own."""
    slots = []
    for path, value in weights.items():
        owner, _, leaf = path.rpartition(".")
        slots.append((net.get_submodule(owner)._parameters, leaf, value))
    before = [own[leaf] for own, leaf, _ in slots]
    try:
        for own, leaf, value in slots:
            own[leaf] = value  # type: ignore[assignment]
        yield
    finally:
        for (own, leaf, _), value in zip(slots, before, strict=True):
            own[leaf] = value


@singledispatch
def put_in(space: Any, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    """The weights of `net`, by path, as these trainables make them; None for a space whose trainables are no weights.

    Gradients flow from the weights to the trainables.
    """
    return None


def are_weights(space: Any) -> bool:
    """Whether this space's trainables can be put into the network's own weights."""
    return put_in.dispatch(type(space)) is not put_in.dispatch(object)


@put_in.register
def _params(space: Params, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    return _cast(net, {path: theta[name] for path, name in with_ties(net, space.chosen(net)).items()})


@put_in.register
def _head(space: Head, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    return _cast(net, {name: theta[name] for name in space.chosen(net)})  # a tied head is untied


@put_in.register
def _mask(space: Mask, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    out, weights = {}, dict(net.named_parameters(remove_duplicate=False))
    for name, at in space.positions(net).items():
        delta = theta[f"{name}.sparse_delta"]
        out[name] = weights[name].to(delta.dtype).flatten().index_add(0, at, delta).view_as(weights[name])
    return _cast(net, out)


@put_in.register
def _lora(space: LoRA, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    made = {path: partial(space.weight, net.get_submodule(path), path, theta) for path in factors(theta)}
    out = {f"{path}.weight": make if isinstance(make.args[0], Unpacking) else make() for path, make in made.items()}
    saved = with_ties(net, space._saved(net))
    return _cast(net, out | {path: theta[PEFT + name] for path, name in saved.items()})


@put_in.register
def _ia3(space: IA3, net: Any, theta: Mapping[str, Tensor]) -> Tree | None:
    out: Tree = {}
    for path, module in space._sites(net).items():
        gain = theta[f"{PEFT}{path}.ia3_l"]  # [o, 1] or [1, i]
        weight = module.weight.to(gain.dtype)
        out[f"{path}.weight"] = weight * (gain.T if isinstance(module, Conv1D) else gain)
        if module.bias is not None and not space._input_side(path):
            out[f"{path}.bias"] = module.bias * gain[:, 0]
    saved = {n: theta[PEFT + n] for n, _ in net.named_parameters() if space.trains(n)}
    return _cast(net, out | saved)


def _cast(net: Any, weights: Mapping[str, Any]) -> Tree:
    own = dict(net.named_parameters(remove_duplicate=False))
    return {n: w.to(own[n]) if isinstance(w, Tensor) else w for n, w in weights.items()}

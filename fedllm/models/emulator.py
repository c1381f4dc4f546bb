"""A smaller model made of some blocks of a larger one: what clients hold when the owner keeps the rest."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.core.errors import ModelError
from fedllm.core.rng import torch_own
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.quantized import kind_of
from fedllm.spaces.layers import block_of

KEPT = "fedllm_blocks"
"""In the config of an emulator: which blocks of the owner's model it has."""
MADE: weakref.WeakKeyDictionary[Model, dict[tuple[int, ...], Model]] = weakref.WeakKeyDictionary()
GROWN: weakref.WeakKeyDictionary[Model, dict[tuple[int, ...], tuple[Mapping[str, Tensor], Model]]] = (
    weakref.WeakKeyDictionary())
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers")
"""Lists of a config with an entry a block."""


def blocks_of(net: nn.Module) -> nn.ModuleList:
    """The network's stack of blocks; ModelError for a network that is none."""
    body = net.base_model if isinstance(net, PreTrainedModel) else net
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and block_of(f"{name}.0.x") == 0 and len(module) > 1:
            return module
    raise ModelError(f"{type(net).__name__} has no stack of two blocks or more, so none of them can be kept back")


def emulator(model: Model, kept: Sequence[int]) -> Model:
    """An ordinary model of these blocks, numbered from 0, with all else of `model`; made once for the same `kept`.

    Weights are shared, blocks that are not kept are not in it, and `net.save_pretrained` makes a folder for clients to
    load. A model that was loaded from such a folder is given back as it is.
    """
    want = tuple(kept)
    if model.rules.net != "causal":
        raise ModelError(f"data.task = {model.task!r}: only a causal language model is thinned to an emulator here")
    if tuple(vars(model.net.config).get(KEPT, ())) == want:
        return model
    made = MADE.setdefault(model, {})
    if want not in made:
        made[want] = _on(model, _thinned(model.net, want))
        made[want].share = len(want) / len(blocks_of(model.net))
        if model.start is not None:
            made[want].start = renamed(model.start, {old: new for new, old in enumerate(want)})
    return made[want]


def _on(model: Model, net: nn.Module) -> Model:
    """A model like this one with another network, which runs in the ways that were found right for this one."""
    made = Model(net, model.tokenizer, model.task, model.space, labels=model.labels, seed=model.seed,
                 fast_kernels=model.fast_kernels, name=model.name)
    if made.ways != model.ways:
        made.go(model.ways)
    return made


def blocks_at(model: Model, numbers: Sequence[int]) -> dict[str, Tensor]:
    """The weights of these blocks, as the network names them, in host memory; ModelError where they are packed."""
    if packed := kind_of(model.net):
        raise ModelError(f"model.quantize = {packed!r} and blocks that are sent to clients do not fit together: packed "
                         "weights are made for the device that they lie on; leave quantize out")
    return {n: t.detach().cpu() for n, t in model.net.state_dict().items() if block_of(n) in set(numbers)}


def per_block(model: Model, kept: Sequence[int]) -> dict[str, list[Any]]:
    """What the config says of each of these blocks."""
    return _lists(model.net.config, kept)


def _lists(config: Any, kept: Sequence[int]) -> dict[str, list[Any]]:
    said = vars(config)
    return {k: [said[k][i] for i in kept] for k in PER_BLOCK if said.get(k)}


def grown(model: Model, kept: Sequence[int], blocks: Mapping[str, Tensor], lists: Mapping[str, list[Any]],
          share: float = 1.0) -> Model:
    """`model`, an emulator, with further `blocks` of its owner's: those of `kept` in all, by the owner's numbers.

    Made once for the same weights. `lists` is the owner's `per_block`, `share` how much of its blocks these are.
    """
    want, own = tuple(kept), list(vars(model.net.config)[KEPT])
    if odd := [k for k, of_each in lists.items() if k not in PER_BLOCK or len(of_each) != len(want)]:
        raise ModelError(f"'{odd[0]:.60}' is no list of a config with an entry for each of {len(want)} blocks; allowed "
                         f"are {', '.join(PER_BLOCK)}")
    before = GROWN.setdefault(model, {}).get(want)
    if before is None or not (before[0].keys() == blocks.keys() and all(
            t is blocks[n] or torch.equal(t, blocks[n]) for n, t in before[0].items())):
        place = {n: i for i, n in enumerate(want)}
        weights = renamed(dict(model.net.state_dict()), {i: place[n] for i, n in enumerate(own)})
        net = _built(model.net, want, weights | renamed(blocks, place), lists)
        before = GROWN[model][want] = dict(blocks), _on(model, net)
        before[1].share = share
    return before[1]


def _thinned(net: Any, kept: tuple[int, ...]) -> nn.Module:
    """A network of the same class with fewer blocks, on the very same weights."""
    if isinstance(net, HeadedEncoder) or not isinstance(net, PreTrainedModel):
        raise ModelError(f"{type(net).__name__}: only language models are made of blocks that can be left out here")
    if not 0 <= min(kept) <= max(kept) < len(blocks_of(net)):
        raise ModelError(f"blocks {list(kept)} are not all among the model's {len(blocks_of(net))}")
    weights = renamed(dict(net.state_dict()), {old: new for new, old in enumerate(kept)})
    return _built(net, kept, weights, _lists(net.config, kept))


def _built(net: Any, kept: tuple[int, ...], weights: Mapping[str, Tensor], lists: Mapping[str, list[Any]]) -> nn.Module:
    """A network of the class of `net` with so many blocks, on these weights."""
    config = copy.deepcopy(net.config)
    config.num_hidden_layers = len(kept)
    for key, of_each in {**lists, KEPT: list(kept)}.items():
        setattr(config, key, of_each)
    with torch_own():
        made = type(net)(config).to(net.dtype)
    made.load_state_dict({n: t.to(net.device) for n, t in weights.items()}, assign=True)
    made.tie_weights()
    return made.to(net.device)


def renamed(tree: Mapping[str, Tensor], numbers: Mapping[int, int]) -> dict[str, Tensor]:
    """The tree with its blocks renumbered; what lies in a block without a new number is left out."""
    out = {}
    for name, leaf in tree.items():
        at = block_of(name)
        if at is None:
            out[name] = leaf
        elif at in numbers:
            out[re.sub(rf"(^|\.)(layers|layer|h|blocks)\.{at}\.", rf"\g<1>\g<2>.{numbers[at]}.", name, count=1)] = leaf
    return out

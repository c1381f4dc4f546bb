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
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.layers import block_of

KEPT = "fedllm_blocks"
"""In the config of an emulator: which blocks of the owner's model it has."""
MADE: weakref.WeakKeyDictionary[Model, dict[tuple[int, ...], Model]] = weakref.WeakKeyDictionary()


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
        made[want] = Model(_thinned(model.net, want), model.tokenizer, model.task, model.space, labels=model.labels,
                           seed=model.seed, fast_kernels=model.fast_kernels, name=model.name)
    return made[want]


def _thinned(net: Any, kept: tuple[int, ...]) -> nn.Module:
    """A network of the same class with fewer blocks, on the very same weights."""
    if isinstance(net, HeadedEncoder) or not isinstance(net, PreTrainedModel):
        raise ModelError(f"{type(net).__name__}: only language models are made of blocks that can be left out here")
    if not 0 <= min(kept) <= max(kept) < len(blocks_of(net)):
        raise ModelError(f"blocks {list(kept)} are not all among the model's {len(blocks_of(net))}")
    config = copy.deepcopy(net.config)
    config.num_hidden_layers = len(kept)
    if per_block := vars(config).get("layer_types"):
        config.layer_types = [per_block[i] for i in kept]
    setattr(config, KEPT, list(kept))
    with torch.random.fork_rng(devices=[]):
        thin = type(net)(config).to(net.dtype)
    weights = renamed(dict(net.state_dict()), {old: new for new, old in enumerate(kept)})
    thin.load_state_dict(weights, assign=True)
    thin.tie_weights()
    return thin.to(net.device)


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

"""A narrower network whose weights are the first rows and columns of a wider one's: what a small client trains."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.core.errors import ModelError
from fedllm.core.rng import torch_own
from fedllm.models.emulator import blocks_of
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.slices import INNER, OUTER, Slice

SIZES = ("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "embedding_size",
         "num_attention_heads", "num_key_value_heads")
"""What configs call the sizes that a width cuts; a head stays as wide as it is."""
KNOWN = re.compile(rf"(?:^|\.)(?:{INNER['heads']}|{INNER['width']}|{OUTER})$")
"""Linear maps of a block whose first rows or columns are whole heads or neurons; of fused ones they are not."""
MADE: weakref.WeakKeyDictionary[Model, dict[tuple[float, bool], Model]] = weakref.WeakKeyDictionary()


def narrow(model: Model, width: float, scaled: bool = False) -> Model:
    """The same network with `width` of its heads, neurons and states, made once; `model` itself at width 1.

    `scaled`: what token embeddings and the linear maps of blocks give is divided by the width, as HeteroFL has it while
    a narrow network trains. ModelError where the width leaves parts of a head or neuron, or projections are fused.
    """
    if width == 1:
        return model
    made = MADE.setdefault(model, {})
    if (width, scaled) not in made:
        net = cut_net(model.net, width)
        if scaled:
            scale(net, width)
        made[width, scaled] = Model(net, model.tokenizer, model.task, model.space, labels=model.labels, seed=model.seed,
                                    fast_kernels=model.fast_kernels and not scaled, name=model.name,
                                    weights=model.weights)
    return made[width, scaled]


def nested(whole: Mapping[str, Sequence[int]], small: Mapping[str, Sequence[int]]) -> Slice:
    """Where the narrow network's trainables lie in the whole one's (shapes by name): the first of each axis."""
    cuts = [{n: torch.arange(s[axis]) for n, s in small.items() if len(s) > axis and s[axis] < whole[n][axis]}
            for axis in (0, 1)]
    return Slice(tuple(small), *cuts)


def shapes_of(theta: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Name -> shape."""
    return {n: list(t.shape) for n, t in theta.items()}


def cut_net(net: Any, width: float) -> nn.Module:
    """The narrow network on a copy of its part of the weights."""
    body = net.body if isinstance(net, HeadedEncoder) else net
    if not isinstance(body, PreTrainedModel):
        raise ModelError(f"{type(net).__name__} is no network of transformers, so its width is not cut here")
    stack = blocks_of(body)
    if odd := next((n for n, m in stack.named_modules() if type(m).__name__ in ("Linear", "Conv1D")
                    and not (isinstance(m, nn.Linear) and KNOWN.search(n))), None):
        raise ModelError(f"{type(body).__name__}: '{odd}' in its blocks is no separate projection of heads or neurons "
                         "(fused ones are not taken apart), so its width is not cut")
    with torch_own():
        small: Any = type(body)(narrowed(body.config, width))
        if isinstance(net, HeadedEncoder):
            if "pooler" in dict(small.named_children()):
                small.pooler = None
            small = HeadedEncoder(small, net.classifier.out_features, net.pooling)
    small = small.to(net.dtype)
    whole, parts = dict(net.named_parameters()), dict(small.named_parameters())
    if odd := next(iter(whole.keys() ^ parts.keys()), None):
        raise ModelError(f"{type(body).__name__}: '{odd}' is only in one of the whole and the narrow network, so its "
                         "width is not cut")
    held = dict(net.state_dict())
    small.load_state_dict({n: held[n][tuple(slice(0, size) for size in t.shape)].clone()
                           for n, t in small.state_dict().items()}, assign=True)
    (small.body if isinstance(small, HeadedEncoder) else small).tie_weights()
    return small.to(next(net.parameters()).device)


def narrowed(config: Any, width: float) -> Any:
    """The config of the narrow network."""
    out = copy.deepcopy(config)
    for key in SIZES:
        size = vars(config).get(key)
        if isinstance(size, int):
            if abs(size * width - round(size * width)) > 1e-9 or round(size * width) < 1:
                raise ModelError(f"width = {width:g} is not allowed: the model's config has {key} = {size}, of which "
                                 f"{size * width:g} would be left; it must be a whole number from 1 up")
            setattr(out, key, round(size * width))
    return out


def scale(net: nn.Module, width: float) -> None:
    """Divide what token embeddings and the linear maps of blocks give."""
    def divided(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        return y / width

    hook: Callable[..., Any] = divided
    body: Any = net.body if isinstance(net, HeadedEncoder) else net
    for module in (body.get_input_embeddings(), *(m for m in blocks_of(body).modules() if isinstance(m, nn.Linear))):
        module.register_forward_hook(hook)

"""Prefix tuning: learned keys and values in front of every layer's own (Li and Liang, ACL 2021), no reprojection."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig
from torch import nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import CAUSAL, Prompt, Space, Stack

NAME = "prompt_embeddings"
SHAPES: weakref.WeakKeyDictionary[nn.Module, tuple[int, int, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Prefix(Space):
    """`length` virtual positions in every layer; one tensor [P, layers * 2 * kv_heads * head_dim], as PEFT keeps it."""

    multiplies: ClassVar[bool] = False
    over_packed: ClassVar[bool] = True
    stays: ClassVar[str] = "it puts virtual tokens before the text"
    peft: ClassVar[str] = "PREFIX_TUNING"
    length: int = knob(16, "number of virtual positions", ge=1)
    std: float = knob(0.02, "standard deviation of the start", gt=0)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        layers, heads, dim = kv_shape(net)
        return {NAME: torch.randn(self.length, layers * 2 * heads * dim, generator=rng) * self.std}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        kv_shape(net)  # refuses a network that takes no cached keys
        return True

    @property
    def places(self) -> int:
        return self.length

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        p = stack.tensors.get(NAME)  # [K, P, L*2*h*d]
        if p is None:
            return None
        layers, heads, dim = kv_shape(net)
        k, length, each = p.shape[0], p.shape[1], rows // stack.k
        kv = p.view(k, length, layers, 2, heads, dim).permute(2, 3, 0, 4, 1, 5)  # [L, 2, K, h, P, d]
        kv = kv.to(net.dtype).repeat_interleave(each, 2)  # [L, 2, N, h, P, d]
        return Prompt(length, cache=[(layer[0], layer[1]) for layer in kv])

    @classmethod
    def peft_knobs(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": config["num_virtual_tokens"]}

    def peft_config(self, net: nn.Module, task: str) -> PrefixTuningConfig:
        layers, heads, dim = kv_shape(net)
        return PrefixTuningConfig(num_virtual_tokens=self.length, num_layers=layers, num_attention_heads=heads,
                                  token_dim=heads * dim, num_transformer_submodules=1, prefix_projection=False,
                                  task_type="CAUSAL_LM" if task in CAUSAL else "FEATURE_EXTRACTION")


def kv_shape(net: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, head width) of a network, as its own cache has them after one word.

    ModelError where its layers keep no keys and values, or not all of one shape.
    """
    if net not in SHAPES:
        reader: Any = dict(net.named_children()).get("body", net)  # under a classifier of ours
        ids = torch.ones(1, 1, dtype=torch.long, device=next(net.parameters()).device)
        try:
            with torch.no_grad():
                kept = reader(input_ids=ids, use_cache=True).cache.layers
            shapes = {tuple(t.shape) for layer in kept for t in (layer.keys, layer.values)}
            ((_, heads, _, width),) = shapes
        except (AttributeError, TypeError, ValueError):
            raise ModelError(f"prefix: {type(reader).__name__} keeps no keys and values of one shape for all its "
                             "layers; use 'soft_prompt' or 'lora'") from None
        SHAPES[net] = len(kept), heads, width
    return SHAPES[net]

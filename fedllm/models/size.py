"""How much one step may hold, from a model's own sizes: vocabulary, layers, widths, type, and the machine's memory.

The bounds hang on nothing that changes while the machine runs (never on what is free at the moment): the same recipe
cuts its work in the same way each time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.data.memory import memory

MOST = 16384
"""Tokens of a step at most, whatever the model: more bring no speed."""
STEP = 1 << 28
"""Bytes that the activations of a training step may take on a CPU (of SmolLM2 some 200 tokens: more clients in a step
bring it little speed); less where a quarter of the memory is less. A client's own batch is never cut."""
READ, CACHE = 9 / 8, 3 / 4
"""Of a step's bytes, what a pass without gradients may take, and what the keys and values of a generation may."""


@dataclass(frozen=True)
class Sizes:
    """A transformer as its config says it; `item` are the bytes of a number."""

    layers: int
    hidden: int
    inner: int
    kept: int
    """Width of the keys, and of the values, of one token in one layer."""
    words: int
    item: int = 4

    @classmethod
    def of(cls, config: Any, item: int = 4) -> Sizes | None:
        """None where a config does not say them: then nothing is known of the network."""
        said: Mapping[str, Any] = config.to_dict() if config is not None else {}
        said = {**said, **(said.get("text_config") or {})}

        def first(*names: str, otherwise: int = 0) -> int:
            return next((v for n in names if isinstance(v := said.get(n), int) and v > 0), otherwise)

        layers, hidden = first("num_hidden_layers", "n_layer", "num_layers", "n_layers"), first(
            "hidden_size", "n_embd", "d_model", "dim")
        if not layers or not hidden:
            return None
        heads = first("num_attention_heads", "n_head", "n_heads", otherwise=1)
        head = first("head_dim", otherwise=max(1, hidden // heads))
        inner = first("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", otherwise=4 * hidden)
        return cls(layers, hidden, inner, first("num_key_value_heads", otherwise=heads) * head,
                   first("vocab_size", otherwise=1), item)

    @property
    def learned(self) -> int:
        """Bytes that a backward pass keeps of each token: about 10 states and 3 inner products a layer."""
        return self.item * self.layers * (10 * self.hidden + 3 * self.inner)

    @property
    def read(self) -> int:
        """Bytes of each token that a pass without gradients has at once: one layer's."""
        return self.item * (12 * self.hidden + 4 * self.inner)

    @property
    def cached(self) -> int:
        """Bytes of keys and values that a text keeps for each of its tokens."""
        return self.item * self.layers * 2 * self.kept


def step_tokens(model: Any) -> int:
    """Tokens of one training step over all lanes."""
    return _fit(model, 1.0, "learned")


def read_tokens(model: Any) -> int:
    """Tokens of one pass without gradients over all lanes."""
    return _fit(model, READ, "read")


def cached_tokens(model: Any) -> int:
    """Tokens whose keys and values a generation may hold over all rows."""
    return _fit(model, CACHE, "cached")


def _fit(model: Any, share: float, what: str) -> int:
    net = model.net
    item = max((p.element_size() for p in net.parameters()), default=4)
    sizes = Sizes.of(getattr(getattr(net, "body", net), "config", None), item)
    if sizes is None:
        return MOST
    return max(1, min(MOST, int(share * room(model.device) / getattr(sizes, what))))


@functools.cache
def room(device: torch.device) -> int:
    """Bytes for a step: `STEP` or a quarter of the memory, whichever is less; on a card a quarter of the card's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return min(STEP, memory() // 4)


def weights(config: Any, causal: bool = True) -> int:
    """How many numbers a network of this config has, without building it."""
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        net = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    return sum(math.prod(p.shape) for p in net.parameters())

"""Prefixes by layer: a tensor of learned keys and values for each layer, of which any may be left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.layers import block_of
from fedllm.spaces.prefix import NAME, Prefix, kv_shape
from fedllm.spaces.space import Prompt, Space, Stack, patch


@dataclass(frozen=True)
class LayerPrefix(Space):
    """`layers.<i>.prefix` [P, 2 * kv_heads * head_dim] for every layer; in one that a tree lacks nobody sees a prefix.

    With all of them it is the space `prefix`, which PEFT knows.
    """

    multiplies: ClassVar[bool] = False
    over_packed: ClassVar[bool] = True
    stays: ClassVar[str] = "it puts virtual tokens before the text"
    length: int = knob(16, "number of virtual positions", ge=1)
    std: float = knob(0.02, "standard deviation of the start", gt=0)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        whole = Prefix(self.length, self.std).start(net, rng)[NAME]
        return {name_of(i): piece.contiguous() for i, piece in enumerate(whole.chunk(kv_shape(net)[0], 1))}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for i, block in enumerate(blocks(net)):
            patch(block, lambda forward, i=i: masked(forward, stack, i))  # type: ignore[misc]
        return True

    @property
    def places(self) -> int:
        return self.length

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        if not (some := there(stack)):
            return None
        layers, heads, dim = kv_shape(net)
        like = next(iter(some.values()))
        k, length, each = like.shape[0], like.shape[1], rows // stack.k
        cache = []
        for i in range(layers):
            kv = some.get(name_of(i), torch.zeros_like(like)).view(k, length, 2, heads, dim)  # zeros: never looked at
            kv = kv.permute(2, 0, 3, 1, 4).to(net.dtype).repeat_interleave(each, 1)  # [2, N, h, P, d]
            cache.append((kv[0], kv[1]))
        return Prompt(length, cache=cache)

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[Any, Tree] | None:
        names = [name_of(i) for i in range(kv_shape(net)[0])]
        if any(n not in theta for n in names):
            return None  # PEFT's prefixes are in every layer
        config: Any = Prefix(self.length, self.std).peft_config(net, task)
        return config, {NAME: torch.cat([theta[n] for n in names], 1)}

    def from_peft(self, config: Mapping[str, Any], tree: Tree, fresh: Mapping[str, Tensor]) -> Tree:
        return {n: piece.contiguous() for n, piece in zip(fresh, tree[NAME].chunk(len(fresh), 1), strict=True)}


def blocks(net: nn.Module) -> list[nn.Module]:
    """The network's layers; ModelError for one that takes no cached keys, or whose layers cannot be found."""
    depth = kv_shape(net)[0]
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and block_of(f"{name}.0.x") == 0 and len(module) == depth:
            return list(module)
    raise ModelError(f"layer_prefix: {type(net).__name__} keeps keys of {depth} layers and has no list of so many; use "
                     "the space 'prefix'")


def name_of(layer: int) -> str:
    """The trainable of this layer."""
    return f"layers.{layer}.prefix"


def there(stack: Stack) -> dict[str, Tensor]:
    """The prefixes among what is trained, stacked [K, P, 2 * h * d]."""
    return {n: t for n, t in stack.tensors.items() if n.startswith("layers.") and n.endswith(".prefix")}


def masked(forward: Callable[..., Any], stack: Stack, layer: int) -> Callable[..., Any]:
    """A block's forward in which nobody sees the first P positions where other layers have a prefix and this has none.
    """
    takes = inspect.signature(forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        some = there(stack)
        if not some or name_of(layer) in some:
            return forward(*args, **kwargs)
        bound = takes.bind(*args, **kwargs)
        given, x = bound.arguments, bound.arguments["hidden_states"]
        p, mask = next(iter(some.values())).shape[1], given.get("attention_mask")
        if mask is None:  # one new token that sees all there is
            seen = given["cache"].get_seq_length(layer) + x.shape[1]
            mask = torch.ones(x.shape[0], 1, x.shape[1], seen, dtype=torch.bool, device=x.device)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        given["attention_mask"] = torch.cat([torch.full_like(mask[..., :p], hidden), mask[..., p:]], -1)
        return forward(*bound.args, **bound.kwargs)

    return call

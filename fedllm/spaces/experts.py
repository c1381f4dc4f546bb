"""Experts: feed-forward parts beside each block's own, with a router row and a bias each (FlexOlmo, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack, patch

PARTS = ("gate_proj", "up_proj", "down_proj")
LEAVES = (*PARTS, "router", "bias")
MINE, PUBLIC = "own", "public"
"""The expert that somebody trains, and the block's own, of which there is the router's row alone."""


@dataclass(frozen=True)
class Experts(Space):
    """y = sum_i g_i FFN_i(x), with g the softmax of W x + c over the `top_k` largest and c <= 0 for all but the public.

    A tree may hold any number of experts, `<path>.experts.<name>.<leaf>`; without any it is the model as it is. The
    own one starts as a copy of the public one.
    """

    stays = "its experts are modules of their own"
    top_k: int = knob(2, "experts that a token goes through; 0: all", ge=0)

    def sites(self, net: nn.Module) -> dict[str, Any]:
        """Gated feed-forward parts by path."""
        found = {p: m for p, m in net.named_modules() if p and all(isinstance(getattr(m, n, None), nn.Linear)
                                                                   for n in PARTS)}
        if not found or any(m.gate_proj.bias is not None for m in found.values()):
            raise ModelError(f"experts: {type(net).__name__} has no feed-forward parts of gate_proj, up_proj and "
                             "down_proj without biases; Llama, Mistral, Qwen and OLMo have")
        return found

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree: Tree = {}
        for path, part in self.sites(net).items():
            for n in PARTS:
                w = getattr(part, n).weight.detach()
                tree[leaf(path, MINE, n)] = w.to(torch.promote_types(w.dtype, torch.float32)).clone()
            width = part.gate_proj.in_features
            tree |= {leaf(path, MINE, "router"): torch.zeros(width), leaf(path, MINE, "bias"): torch.zeros(1)}
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path, part in self.sites(net).items():
            patch(part, lambda frozen, path=path, part=part: self._mixed(frozen, path, part, stack))
        return True

    def prepare(self, stack: Stack, trees: Sequence[Mapping[str, Tensor]]) -> None:
        stack.extra["experts"] = names_of(stack.tensors)

    def multiplied(self, name: str) -> bool:
        return name.rpartition(".")[2] in PARTS

    def place(self, name: str) -> str:
        return name.partition(".experts.")[0] + "." + name.rpartition(".")[2]

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return not names_of(theta)

    def _mixed(self, frozen: Callable[[Tensor], Tensor], path: str, part: Any, stack: Stack) -> Callable:
        def forward(x: Tensor) -> Tensor:
            names = stack.extra.get("experts", {}).get(path)
            if not names:
                return frozen(x)
            t = {n: {f: stack.tensors[leaf(path, n, f)].to(x.dtype) for f in LEAVES} for n in names}
            lanes = stack.lanes(x)  # [K, N, d]
            public = stack.tensors.get(leaf(path, PUBLIC, "router"), torch.zeros_like(t[names[0]]["router"]))
            rows = torch.stack([public.to(x.dtype), *(t[n]["router"] for n in names)], 1)  # [K, 1 + E, d]
            c = torch.cat([t[n]["bias"].clamp(max=0) for n in names], 1)  # [K, E]
            z = lanes @ rows.mT + torch.cat([torch.zeros_like(c[:, :1]), c], 1)[:, None]  # [K, N, 1 + E]
            if 0 < self.top_k < z.shape[-1]:
                z = z.masked_fill(z < z.topk(self.top_k).values[..., -1:], -torch.inf)
            g = z.softmax(-1)
            y = g[..., :1] * stack.lanes(frozen(x))
            for i, n in enumerate(names, 1):
                inner = part.act_fn(lanes @ t[n]["gate_proj"].mT) * (lanes @ t[n]["up_proj"].mT)
                y = y + g[..., i : i + 1] * (inner @ t[n]["down_proj"].mT)
            return y.reshape(x.shape)

        return forward


def leaf(path: str, name: str, part: str) -> str:
    """The name of one tensor of an expert."""
    return f"{path}.experts.{name}.{part}"


def names_of(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """Experts by the path of their block, in the order of their names; ModelError for one of which something lacks."""
    found: dict[str, dict[str, set[str]]] = {}
    for key in tree:
        path, inside, rest = key.partition(".experts.")
        name, _, part = rest.rpartition(".")
        if inside and name != PUBLIC:
            found.setdefault(path, {}).setdefault(name, set()).add(part)
    for path, experts in found.items():
        for name, parts in experts.items():
            if lacks := set(LEAVES) - parts:
                raise ModelError(f"expert '{name}' of {path} lacks {min(lacks)}: nobody trained it whole")
    return {path: sorted(experts) for path, experts in found.items()}


def renamed(tree: Mapping[str, Tensor], before: str, after: str) -> Tree:
    """The expert `before` of a tree, under another name."""
    return {k.replace(f".experts.{before}.", f".experts.{after}.", 1): t for k, t in tree.items()
            if f".experts.{before}." in k}

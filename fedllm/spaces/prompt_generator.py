"""A network that makes the classes' prompt of their names (FedTPG): unseen classes get a prompt of their own names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.class_prompt import STD, seeing
from fedllm.spaces.space import Space, Stack

NET = "clip.text_model.prompt_net."
WIDE = 4
"""The gated layer's width, in widths of a token."""


@dataclass(frozen=True)
class PromptGenerator(Space):
    """P = FFN'(MHA(LN Q, LN T, LN T)) with T the features of the bare names of those classes that a row is told among:
    `length` tokens for all of them. FFN'(x) = x + W2 geglu(W1 LN x); then `depth` blocks of self-attention."""

    multiplies: ClassVar[bool] = False
    stays: ClassVar[str] = "it makes learned tokens before the names of classes"
    length: int = knob(4, "number of context tokens", ge=1)
    heads: int = knob(4, "attention heads; they divide the width of a token", ge=1)
    depth: int = knob(0, "blocks of self-attention behind", ge=0, le=8)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        clip = seeing(net, self.stem)
        w, p = clip.get_input_embeddings().weight.shape[1], clip.width
        if w % self.heads:
            raise RecipeError(f"space.heads = {self.heads} does not divide the width of a token, {w}")
        clip.names.sentences(self.length, "end", clip.text_room, clip.labels)  # there is room for them
        tree = {"queries": STD * torch.randn(self.length, w, generator=rng), **_attention("cross", w, p, rng),
                **_norm("cross.norm", w), **_norm("cross.norm_names", p), **_gated("cross", w, rng)}
        for i in range(self.depth):
            tree |= {**_attention(f"{i}", w, w, rng), **_norm(f"{i}.norm", w), **_gated(f"{i}", w, rng)}
        return {NET + n: t for n, t in tree.items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        seeing(net, self.stem)
        return True

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        """Each row against the classes that it is told among, under the prompt that their names make."""
        if NET + "queries" not in stack.tensors:
            return None
        clip: Any = net
        lanes, sets, which = class_sets(batch, stack.k, len(clip.names.names))
        p = self.prompts({n.removeprefix(NET): t[lanes] for n, t in stack.tensors.items()}, clip.bare(), sets)
        texts = clip.spoken(p[:, None].expand(-1, sets.shape[1], -1, -1), only=sets)  # [S, C, d]
        return clip.matched(stack, clip.seen(batch), texts[which], batch)

    def prompts(self, g: Mapping[str, Tensor], names: Tensor, sets: Tensor) -> Tensor:
        """[S, m, w] by networks g, each stacked [S, ...], of the names' features [C, p] that `sets` [S, C] take."""
        t = names.to(g["queries"].dtype)[None].expand(len(sets), -1, -1)
        x = self._attend(g, "cross", _normed(g, "cross.norm", g["queries"]), _normed(g, "cross.norm_names", t), sets)
        x = x + _through(g, "cross", x)  # the attention itself has no residual
        for i in range(self.depth):
            h = _normed(g, f"{i}.norm", x)
            x = x + self._attend(g, f"{i}", h, h, None)
            x = x + _through(g, f"{i}", x)
        return x

    def _attend(self, g: Mapping[str, Tensor], at: str, q: Tensor, t: Tensor, sets: Tensor | None) -> Tensor:
        """Multi-head attention [S, m, w] of queries [S, m, w] over [S, C, p], of which `sets` [S, C] are there."""
        q, k, v = (_linear(g, f"{at}.{n}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for n, x in (("q", q), ("k", t), ("v", t)))
        z = q @ k.mT / math.sqrt(q.shape[-1])  # [S, heads, m, C]
        if sets is not None:
            z = z.masked_fill(~sets[:, None, None], -torch.inf)
        return _linear(g, f"{at}.out", (z.softmax(-1) @ v).transpose(1, 2).flatten(2))


def class_sets(batch: Any, k: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs of a lane and a set of classes in a batch: lane [S], set [S, C], and each row's pair [N]."""
    n, device = len(batch.ids), batch.ids.device
    some = batch.parts["among"].to(device) > 0 if "among" in batch.parts else torch.ones(
        n, classes, dtype=torch.bool, device=device)
    first = some.view(k, -1, classes)[:, :1].expand(-1, n // k, -1).reshape(n, classes)
    some = torch.where(some.any(1, keepdim=True), some, first)  # rows that fill up a lane name none
    some = some | ~some.any(1, keepdim=True)
    lane = torch.arange(k, device=device).repeat_interleave(n // k)
    pairs, which = torch.unique(torch.cat([lane[:, None], some.long()], 1), dim=0, return_inverse=True)
    return pairs[:, 0], pairs[:, 1:].bool(), which


def _linear(g: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return torch.baddbmm(g[f"{at}.bias"][:, None], x, g[f"{at}.weight"].mT)


def _normed(g: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * g[f"{at}.weight"][:, None] + g[f"{at}.bias"][:, None]


def _through(g: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    h, gate = _linear(g, f"{at}.wide", _normed(g, f"{at}.norm_wide", x)).chunk(2, -1)
    return _linear(g, f"{at}.narrow", h * F.gelu(gate))


def _map(at: str, out: int, into: int, rng: torch.Generator) -> Tree:
    """As torch starts a linear map."""
    bound = 1 / math.sqrt(into)
    return {f"{at}.weight": (torch.rand(out, into, generator=rng) * 2 - 1) * bound,
            f"{at}.bias": (torch.rand(out, generator=rng) * 2 - 1) * bound}


def _norm(at: str, width: int) -> Tree:
    return {f"{at}.weight": torch.ones(width), f"{at}.bias": torch.zeros(width)}


def _attention(at: str, w: int, p: int, rng: torch.Generator) -> Tree:
    return {**_map(f"{at}.q", w, w, rng), **_map(f"{at}.k", w, p, rng), **_map(f"{at}.v", w, p, rng),
            **_map(f"{at}.out", w, w, rng)}


def _gated(at: str, w: int, rng: torch.Generator) -> Tree:
    return {**_norm(f"{at}.norm_wide", w), **_map(f"{at}.wide", 2 * WIDE * w, w, rng),
            **_map(f"{at}.narrow", w, WIDE * w, rng)}

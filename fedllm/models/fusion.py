"""Two modalities' features joined by attention, and a head of one modality alone: small nets by their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream


class Fusion(nn.Module):
    """Features by modality [B, d_m] -> what the attention over them makes [B, h], and class logits [B, C]."""

    def __init__(self, widths: Mapping[str, int], hidden: int, heads: int, classes: int) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({m: nn.Linear(d, hidden) for m, d in widths.items()})
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.leave = nn.Linear(hidden, classes)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.stack([self.enter[m](f) for m, f in features.items()], 1)  # [B, 2, h]
        h = (x + self.attend(x, x, x, need_weights=False)[0]).mean(1)
        return h, self.leave(F.gelu(h))


def fusion_start(net: Fusion, seed: int) -> Tree:
    """Fresh weights that follow from the seed, uniform by each map's inputs; biases are zero."""
    rng, tree = torch_stream(seed, "fusion"), {}
    for name, p in net.named_parameters():
        tree[name] = (torch.rand(p.shape, generator=rng) * 2 - 1) / p.shape[-1] ** 0.5 if p.dim() == 2 else (
            torch.zeros(p.shape))
    return tree


def head_start(width: int, hidden: int, classes: int, seed: int, modality: str) -> Tree:
    """A head's fresh weights: one hidden layer, then the classes."""
    rng = torch_stream(seed, "head", modality)
    sizes = {"hidden": (hidden, width), "classes": (classes, hidden)}
    return {f"{n}.{p}": (torch.rand(s, generator=rng) * 2 - 1) / s[1] ** 0.5 if p == "weight" else torch.zeros(s[0])
            for n, s in sizes.items() for p in ("weight", "bias")}


def head_says(head: Mapping[str, Tensor], f: Tensor) -> tuple[Tensor, Tensor]:
    """What a head makes of features [B, d]: its hidden layer [B, h], and class logits [B, C]."""
    h = F.linear(f, head["hidden.weight"].to(f.dtype), head["hidden.bias"].to(f.dtype))
    return h, F.linear(F.gelu(h), head["classes.weight"].to(f.dtype), head["classes.bias"].to(f.dtype))


def fuse(net: Fusion, tree: Mapping[str, Tensor], f: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the fusion with these weights makes of both features [B, h], and its class logits [B, C]."""
    like = next(iter(f.values()))
    return functional_call(net, {n: t.to(like) for n, t in tree.items()}, (f,))


def fusion_slopes(net: Fusion, tree: Mapping[str, Tensor], f: Mapping[str, Tensor], dz: Tensor) -> Tree:
    """dL/d(weights) from dL/d(its logits)."""
    leaves = {n: t.detach().requires_grad_() for n, t in tree.items()}
    z = fuse(net, leaves, f)[1]
    return dict(zip(leaves, torch.autograd.grad((z * dz).sum(), list(leaves.values())), strict=True))


@dataclass(frozen=True)
class Taught:
    """What a modality learns from beside its own labels: weights of the own loss and of two distances to the fusion."""

    own: float
    feedback: float
    align: float

    def loss(self, h: Tensor, uni: Tensor, fused: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """a (CE(u) + CE(z) / 2) + b KL(u || z) / (CE(u) + CE(z)) + c (1 - cos(h, fused)).

        h, fused [B, h] are the head's hidden layer and the fusion's, uni, z [B, C] what both say, y [B] the labels.
        """
        mine, joint = F.cross_entropy(uni, y), F.cross_entropy(z, y)
        far = F.kl_div(z.log_softmax(-1), uni.log_softmax(-1), log_target=True, reduction="batchmean")
        apart = 1 - F.cosine_similarity(h, fused, dim=-1).mean()
        return self.own * (mine + joint / 2) + self.feedback * far / (mine + joint) + self.align * apart


def head_slopes(head: Mapping[str, Tensor], f: Tensor, y: Tensor, fused: Tensor, z: Tensor, by: Taught | None
                ) -> tuple[Tensor, Tree]:
    """dL/df [B, d] and dL/d(head) of one modality's loss: its labels' alone, or also what the fusion teaches (`by`)."""
    leaves = {"": f.detach().requires_grad_(), **{n: t.detach().requires_grad_() for n, t in head.items()}}
    h, uni = head_says({n: t for n, t in leaves.items() if n}, leaves[""])
    loss = F.cross_entropy(uni, y) if by is None else by.loss(h, uni, fused, z, y)
    slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return slopes.pop(""), slopes

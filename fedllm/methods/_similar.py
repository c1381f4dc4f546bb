"""Personal parts that lean on those of similar clients: weights from distances, and the mean that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedllm.core.payload import Tree


def flat(trees: Sequence[Tree]) -> Tensor:
    """Each tree as one vector [N, D], fp64, by the order of its names and not of its reply."""
    return torch.stack([torch.cat([tree[n].flatten().double() for n in sorted(tree)]) for tree in trees])


def unflat(rows: Tensor, like: Sequence[Tree]) -> list[Tree]:
    """Vectors [N, D] as trees of these shapes and types."""
    names = sorted(like[0])
    sizes = [like[0][n].numel() for n in names]
    return [{n: x.view_as(tree[n]).to(tree[n].dtype) for n, x in zip(names, row.split(sizes), strict=True)}
            for tree, row in zip(like, rows, strict=True)]


def similarity(x: Tensor, sharpness: float) -> Tensor:
    """softmax_j(-sharpness d_ij / median d) [N, N]: distances become similarities, so that the near count more."""
    d = (x[:, None] - x[None]).norm(dim=-1)
    others = d[~torch.eye(len(x), dtype=torch.bool)]
    middle = others.median().clamp_min(1e-12) if len(others) else d.new_ones(())
    return (-sharpness * d / middle).softmax(-1)


def smoothed(trees: Sequence[Tree], weights: Callable[[Tensor], Tensor], hops: int, own: float) -> list[Tree]:
    """p* = (1 - own) A^(1 + hops) p + own p of each, with A = weights(p) [N, N]."""
    if not trees:
        return []
    p = far = flat(trees)
    a = weights(p)
    for _ in range(1 + hops):
        far = a @ far
    return unflat((1 - own) * far + own * p, trees)

"""The sum of clipped gradients in whole numbers: what example-level DP sends where one release is one gradient.

Each row's gradient is clipped and cut to the grid towards zero, entry by entry, so that no row moves the sum by more
than the clip, in exact integers; the sum does not depend on how rows were put together.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm.core.payload import Kept, Tree
from fedllm.local.objective import taken
from fedllm.local.private import HELD, example_grads
from fedllm.local.requests import Fit, Fitted, Limits
from fedllm.models.kernels import products
from fedllm.spaces.space import stack_lanes, take_lane, tree_to


@dataclass(frozen=True)
class Summed(Fit):
    """One step of gradient descent on all rows at once, told as the sum of clipped gradients."""

    clip_norm: float = field(default=1.0, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    """Quanta per 1: entries are cut to multiples of 1 / scale."""

    @property
    def group(self) -> Hashable:
        return (*super().group, self.clip_norm, self.scale)


@dataclass(frozen=True)
class Clipped(Fitted):
    """What one such step gave."""

    start: Tree = field(default_factory=dict)
    sums: Kept = field(default_factory=Kept)
    """int64: sum over rows of trunc(scale * clipped gradient), of every trainable that is not frozen."""


def run_sums(requests: Sequence[Summed], limits: Limits) -> list[Clipped]:
    """Sum for every request; rows of all of them share forwards, the short with the short."""
    model = requests[0].model
    stacked = tree_to(stack_lanes([r.theta for r in requests]), model.device)
    frozen = {n: t for n, t in stacked.items() if any(fnmatch.fnmatch(n, f) for f in requests[0].freeze)}
    params = {n: t for n, t in stacked.items() if n not in frozen}
    lanes = [(k, i) for k, r in enumerate(requests) for i in range(len(r.rows))]
    lengths = [r.lengths for r in requests]
    lanes.sort(key=lambda at: lengths[at[0]][at[1]])
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
    for lot in _lots(lanes, lengths, params, model, limits):
        limits.go_on()
        _add(requests, lot, params, frozen, sums)
        limits.did(len({k for k, _ in lot}), sum(int(lengths[k][i]) for k, i in lot))
    return [_clipped(r, take_lane({n: s.cpu() for n, s in sums.items()}, k, {n: r.theta[n] for n in sums}))
            for k, r in enumerate(requests)]


def _lots(lanes: Sequence[tuple[int, int]], lengths: Sequence[Any], params: Tree, model: Any,
          limits: Limits) -> list[list[tuple[int, int]]]:
    """So many rows at a time as the memory holds: a lane of trainables for each, and its tokens."""
    held = 3 * sum(p[0].numel() * p.element_size() for p in params.values())
    most = max(1, HELD // max(1, held)) if model.stackable else 1
    tokens = limits.learned(model)
    lots: list[list[tuple[int, int]]] = []
    for k, i in lanes:  # of growing length: the last is the widest
        if not lots or len(lots[-1]) >= most or (len(lots[-1]) + 1) * int(lengths[k][i]) > tokens:
            lots.append([])
        lots[-1].append((k, i))
    return lots


def _add(requests: Sequence[Summed], lot: Sequence[tuple[int, int]], params: Tree, frozen: Tree, sums: Tree) -> None:
    first = requests[0]
    model = first.model
    rows = [requests[k].rows[i] for k, i in lot]
    owners = [k for k, _ in lot]
    sides = [taken(requests[k].side, [i]) for k, i in lot]
    base = first.base and tree_to(first.base, model.device)
    with products(model.device, model.fast_kernels):
        grads = example_grads(model, rows, owners, [r.theta for r in requests], base, params, frozen, first.objective,
                              sides)
    at = torch.tensor(owners, device=model.device)
    for n, g in on_grid(grads, first.clip_norm, first.scale).items():
        sums[n].index_add_(0, at, g)


def on_grid(grads: Tree, clip: float, scale: float) -> dict[str, Tensor]:
    """trunc(scale * g min(1, C / ||g||)) of each example, fp64 [examples, ...]: its norm is at most scale * C, exactly.

    Cutting towards zero lengthens nothing, so that rounding adds nothing to the sensitivity. A gradient that is no
    number counts as zero.
    """
    wide = {n: g.double().nan_to_num_(0.0, 0.0, 0.0) for n, g in grads.items()}
    shrink = (clip / _norms(wide).clamp(min=1e-300)).clamp(max=1.0) * scale
    cut = {n: g.mul_(_spread(shrink, g)).trunc_() for n, g in wide.items()}
    over = _norms(cut) > clip * scale  # fp64's rounding of the shrink may have left a last bit too much
    if bool(over.any()):
        less = torch.where(over, 1 - 1e-9, 1.0)
        cut = {n: g.mul_(_spread(less, g)).trunc_() for n, g in cut.items()}
    return cut


def _norms(grads: Tree) -> Tensor:
    return torch.stack([g.flatten(1).pow(2).sum(1) for g in grads.values()]).sum(0).sqrt()


def _spread(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.dim() - 1))


def _clipped(r: Summed, sums: Tree) -> Clipped:
    lr, n = r.spec.rate(0, 1), max(1, len(r.rows))
    moved = {name: torch.add(r.theta[name].double(), s, alpha=-lr / (r.scale * n)).to(r.theta[name].dtype)
             for name, s in sums.items()}
    whole = Kept({name: s.to(torch.int64) for name, s in sums.items()})
    return Clipped({**r.theta, **moved}, 0.0, 1, n, 0, lr, start=r.theta, sums=whole)

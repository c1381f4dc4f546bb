"""Example-level DP inside local training: one lane for each example, its gradient clipped, noise on their sum.

The stacked kernel that serves many clients at once gives exact per-example gradients for nothing: the trainables are
expanded to one lane a row, and each lane's gradient is that row's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.data.encode import Encoded
from fedllm.local.objective import Objective, Side, lane_losses
from fedllm.models.kernels import products
from fedllm.models.model import Model

HELD = 1 << 28
"""Bytes of per-example trainables and gradients that one forward may hold; larger batches go in parts."""


@dataclass(frozen=True)
class Private:
    """DP-SGD of one client (Abadi et al. 2016): clip each example's gradient, add noise to the sum of a batch."""

    clip_norm: float
    noise_multiplier: float
    batch: float
    """The expected size of a Poisson batch: a fixed divisor, whoever is in it."""
    rng: torch.Generator

    @property
    def key(self) -> Hashable:
        """Requests with equal keys can share a step."""
        return ("private", self.clip_norm)


def private_objective(model: Model, rows: Sequence[Sequence[Encoded]], private: Sequence[Private],
                      trees: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None,
                      params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], objective: Objective,
                      sides: Sequence[Side]) -> Tensor:
    """A scalar for each of K lanes whose gradient is the lane's clipped, noised mean gradient.

    `rows` are each lane's batch (it may be empty) and `sides` what goes beside it, `params` and `frozen` the stacked
    tensors [K, ...].
    """
    grads = {n: torch.zeros_like(p) for n, p in params.items()}
    flat = [(k, row, {n: [v[j]] for n, v in sides[k].items()}) for k, lane in enumerate(rows)
            for j, row in enumerate(lane)]
    lane_bytes = 3 * sum(p[0].numel() * p.element_size() for p in params.values())
    size = max(1, HELD // max(1, lane_bytes)) if model.stackable else 1
    for i in range(0, len(flat), size):
        owners, lot, own_sides = zip(*flat[i : i + size], strict=True)
        own = example_grads(model, lot, owners, trees, base, params, frozen, objective, own_sides)
        norms = torch.stack([g.flatten(1).pow(2).sum(1) for g in own.values()]).sum(0).sqrt()  # [examples]
        # g_i <- g_i min(1, C / ||g_i||)
        shrink = (private[0].clip_norm / (norms + 1e-6)).clamp(max=1.0)
        at = torch.tensor(owners, device=norms.device)
        for n, g in own.items():
            grads[n].index_add_(0, at, g.mul_(shrink.view(-1, *[1] * (g.dim() - 1))))
    for k, p in enumerate(private):
        _noise(p, {n: g[k] for n, g in grads.items()}, trees[k])
    return torch.stack([(params[n] * g).flatten(1).sum(1) for n, g in grads.items()]).sum(0)


def example_grads(model: Model, rows: Sequence[Encoded], owners: Sequence[int], trees: Sequence[Mapping[str, Tensor]],
                  base: Mapping[str, Tensor] | None, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor],
                  objective: Objective, sides: Sequence[Side]) -> dict[str, Tensor]:
    """Each row's own gradient [examples, ...]; `sides` holds one row's side for each."""
    at = torch.tensor(owners, device=model.device)
    own = {n: p.detach().index_select(0, at).requires_grad_() for n, p in params.items()}
    fixed = {n: t.index_select(0, at) for n, t in frozen.items()}
    with model.using([trees[k] for k in owners], base, own | fixed), products(model.device, model.fast_kernels):
        loss = lane_losses(objective, model, [[row] for row in rows], sides)
        return dict(zip(own, torch.autograd.grad(loss.sum(), list(own.values())), strict=True))


def _noise(p: Private, grads: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """(sum + N(0, (z C)^2)) / B in place, on what the lane really has: padding to other lanes' ranks stays zero."""
    for n, g in grads.items():
        mine = g[tuple(slice(s) for s in like[n].shape)]
        if p.noise_multiplier:
            std = p.noise_multiplier * p.clip_norm
            mine.add_(torch.randn(mine.shape, generator=p.rng, dtype=mine.dtype).to(mine.device), alpha=std)
        mine.div_(p.batch)

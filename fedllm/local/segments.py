"""Forward and backward through one segment of the model, for many clients in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.local.requests import Limits, Request
from fedllm.models.batch import IGNORE
from fedllm.models.segments import Segment, losses
from fedllm.models.towers import Tower
from fedllm.spaces.space import stack_lanes, take_lane, tree_to


@dataclass(frozen=True)
class Forward(Request):
    """One segment over `x`, ids [B, T], pixels [B, 3, H, W] or states [B, T, d]: states [B, T, d], no gradient."""

    segment: Segment | Tower
    x: Tensor
    mask: Tensor
    """[B, T] bool, False on padding, which lies on the right."""

    @property
    def group(self) -> object:  # type: ignore[override]
        return (*super().group, self.segment, self.x.dtype)  # type: ignore[misc]

    @property
    def reads(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class Backward(Forward):
    """The gradient of one segment: of `g`, dL/d(its states) [B, T, d], or at the last of the loss over `labels` [B, T].

    The forward is computed again, so that nothing but `x` has to wait for the gradient.
    """

    g: Tensor | None = None
    labels: Tensor | None = None
    times: float = 1.0
    """How often the mean loss counts: as often as it has targets, and the gradient is the sum's, rounded as such."""

    @property
    def group(self) -> object:  # type: ignore[override]
        return (*super().group, self.g is None)  # type: ignore[misc]


@dataclass(frozen=True)
class Slopes:
    """What a backward gave."""

    theta: Tree
    """dL/d theta, of the segment's own trainables."""
    x: Tensor | None
    """dL/dx [B, T, d]; None where x are token ids."""
    loss: float
    """Mean loss over the targets; 0 but at the last segment."""


def run_forwards(requests: Sequence[Forward], limits: Limits) -> list[Tensor]:
    """The states of every request, in host memory."""

    def work(lot: Sequence[Forward], x: Tensor, mask: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            h = lot[0].segment.through(lot[0].model, x, mask).cpu()
        return [own(h, k, r, len(lot)) for k, r in enumerate(lot)]

    return _each(requests, limits, work)


def run_backwards(requests: Sequence[Backward], limits: Limits) -> list[Slopes]:
    """The gradients of every request, in host memory."""
    return _each(requests, limits, _slopes)


def _slopes(lot: Sequence[Backward], x: Tensor, mask: Tensor, stacked: Mapping[str, Tensor]) -> list[Slopes]:
    model, segment = lot[0].model, lot[0].segment
    x = x.requires_grad_(x.is_floating_point())
    h, told = segment.through(model, x, mask), torch.zeros(len(lot))
    if lot[0].g is None:
        loss = losses(model, h, padded([r.labels for r in lot], IGNORE).to(h.device), len(lot))  # type: ignore[misc]
        goal = (loss * torch.tensor([r.times for r in lot], dtype=loss.dtype).to(lot[0].model.device)).sum()  # type: ignore[attr-defined]
        told = loss.detach().cpu()  # lanes do not touch, so each lane's gradient is its own
    else:  # d(h . g)/d theta = dh/d theta g
        goal = (h * padded([r.g for r in lot], 0).to(h.device).to(h.dtype)).sum()  # type: ignore[misc]
    wanted = {**stacked, **({"": x} if x.requires_grad else {})}
    found = torch.autograd.grad(goal, list(wanted.values()), allow_unused=True) if goal.requires_grad else [
        None] * len(wanted)
    slopes = {n: (torch.zeros_like(t) if g is None else g).cpu() for (n, t), g in zip(wanted.items(), found,
                                                                                     strict=True)}
    back = slopes.pop("", None)
    return [Slopes(take_lane(slopes, k, r.theta), None if back is None else own(back, k, r, len(lot)), float(told[k]))
            for k, r in enumerate(lot)]


def _each(requests: Sequence[Forward], limits: Limits, work: Callable[..., list]) -> list:
    """`work(lot, x, mask, stacked trainables)` on lots of lanes that fit into one step, within the model's context."""
    done: list = []
    for lot in _lots(requests, limits):
        limits.go_on()
        model, trees = lot[0].model, [r.theta for r in lot]
        stacked = {n: t.detach().requires_grad_() for n, t in tree_to(stack_lanes(trees), model.device).items()}
        base = lot[0].base and tree_to(lot[0].base, model.device)
        mask = padded([r.mask for r in lot], 0).to(model.device)
        mask[~mask.any(1), 0] = True  # rows that fill a short lane: an empty mask would make attention NaN
        x = padded([r.x for r in lot], 0).to(model.device)
        with model.using(trees, base, stacked):
            done += work(lot, x, mask, stacked)
    return done


def _lots(requests: Sequence[Forward], limits: Limits) -> Iterator[list[Forward]]:
    lot: list[Forward] = []
    for r in requests:
        wide = [*lot, r]
        tokens = len(wide) * max(len(x.mask) for x in wide) * max(x.mask.shape[1] for x in wide)
        held = 2 * len(wide) * sum(t.numel() * t.element_size() for t in r.theta.values())
        if lot and (tokens > limits.learned(r.model) or held > limits.lane_bytes or not r.model.stackable):
            yield lot
            wide = [r]
        lot = wide
    if lot:
        yield lot


def padded(lanes: Sequence[Tensor], fill: int) -> Tensor:
    """K tensors [B_k, T_k, ...] as one [K * B, T, ...], filled up to the largest B and T."""
    b, t = max(x.shape[0] for x in lanes), max(x.shape[1] for x in lanes)
    out = lanes[0].new_full((len(lanes), b, t, *lanes[0].shape[2:]), fill)
    for k, x in enumerate(lanes):
        out[k, : x.shape[0], : x.shape[1]] = x
    return out.flatten(0, 1)


def own(h: Tensor, k: int, r: Forward, lanes: int) -> Tensor:
    """What belongs to lane k of `lanes`, without what filled it up."""
    b, t = r.mask.shape
    return h.view(lanes, -1, *h.shape[1:])[k, :b, :t].detach().clone()

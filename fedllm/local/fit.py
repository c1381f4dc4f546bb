"""Local training of K clients in one forward and backward a step."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError
from fedllm.core.payload import Kept
from fedllm.data.encode import Encoded
from fedllm.local import moments
from fedllm.local.noise import noisy
from fedllm.local.objective import Objective, Side, lane_losses, lane_sums, taken
from fedllm.local.packing import packed
from fedllm.local.private import private_objective
from fedllm.local.requests import Fit, Fitted, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Term
from fedllm.models.checkpointing import checkpointed
from fedllm.models.kernels import products
from fedllm.spaces.space import stack_lanes, take_lane, tree_to


def run_fits(requests: Sequence[Fit], limits: Limits) -> list[Fitted]:
    """Train every request; those that fit into one step together run together, or all a client's processes on one."""
    if limits.group is not None:
        return limits.group.run(requests, limits)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].plan))  # who ends first sits last
    done: dict[int, Fitted] = {}
    for lot in _lots([requests[i] for i in order], limits):
        for request, made in zip(lot, _train(lot, limits), strict=True):
            done[id(request)] = made
    return [done[id(r)] for r in requests]


def _lots(requests: Sequence[Fit], limits: Limits) -> list[list[Fit]]:
    """As few as the limits allow, and of like size: a last lot of one client would be slow for its size."""
    lots = _cut(requests, limits, len(requests))
    even = _cut(requests, limits, -(-len(requests) // max(1, len(lots))))
    return even if len(even) == len(lots) else lots


def _cut(requests: Sequence[Fit], limits: Limits, clients: int) -> list[list[Fit]]:
    lots: list[list[Fit]] = []
    tokens = size = 0
    most = limits.learned(requests[0].model)
    for r in requests:
        lengths = r.lengths
        part = len(r.rows) if r.private else r.spec.batch_size  # rows of a step that lie in memory at once
        widest = max((int(lengths[at].max()) * min(len(at), part) for at in r.plan if len(at)), default=0)
        held = 4 * sum(t.numel() * t.element_size() for t in r.theta.values())  # weights, gradients, two moments
        full = bool(lots) and (len(lots[-1]) + 1) * max(tokens, widest) > most
        if not lots or full or len(lots[-1]) >= clients or size + held > limits.lane_bytes:
            lots.append([])
            tokens = size = 0
        lots[-1].append(r)
        tokens, size = max(tokens, widest), size + held
    return lots


def _train(lot: Sequence[Fit], limits: Limits) -> list[Fitted]:
    model, spec, freeze = lot[0].model, lot[0].spec, lot[0].freeze
    stacked = tree_to(stack_lanes([r.theta for r in lot]), model.device)
    base = lot[0].base and tree_to(lot[0].base, model.device)
    frozen = {n: stacked[n] for n in freezes(stacked, freeze)}
    params = {n: t.detach().clone().requires_grad_() for n, t in stacked.items() if n not in frozen}
    terms = [(t, tree_to(stack_lanes([r.terms[j].tensors for r in lot]), model.device))
             for j, t in enumerate(lot[0].terms)]
    optimizer = spec.optimizer_over(list(params.values()), list(params))
    if before := [r.moments for r in lot if r.moments]:
        moments.go_on(optimizer, params, before)
    live, results, lengths = len(lot), list[Fitted](), [r.lengths for r in lot]
    losses, lr_sum = torch.zeros(len(lot), dtype=torch.float64, device=model.device), 0.0
    for step in range(len(lot[0].plan)):
        limits.go_on()
        if (left := sum(len(r.plan) > step for r in lot)) < live:  # the shortest plans sit last
            results = _ended(lot, range(left, live), params, frozen, optimizer, losses, lr_sum) + results
            live = left
            params, optimizer = _shrink(params, optimizer, live, spec)
            frozen = {n: t[:live] for n, t in frozen.items()}
        lr = spec.rate(step, len(lot[0].plan))
        lr_sum += lr
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1.0)
        with products(model.device, model.fast_kernels):
            loss = _descend(lot[:live], step, base, params, frozen, terms)
            _step(params, optimizer, spec.clip_norm)
        losses[:live] += loss.detach().double()
        limits.did(live, sum(int(length[r.plan[step]].sum()) for r, length in zip(lot[:live], lengths, strict=False)))
    return _ended(lot, range(live), params, frozen, optimizer, losses, lr_sum) + results


def freezes(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The trainables that a fit leaves as they are."""
    return [n for n in names if any(fnmatch.fnmatch(n, f) for f in patterns)]


def _ended(lot: Sequence[Fit], lanes: range, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor],
           optimizer: torch.optim.Optimizer, losses: Tensor, lr_sum: float) -> list[Fitted]:
    """What these lanes have come to: one copy to host memory for all of them, and none where they are there."""
    some = slice(lanes.start, lanes.stop)
    home, told = {n: t.detach()[some].cpu() for n, t in (params | frozen).items()}, losses[some].cpu()
    out = []
    for i, k in enumerate(lanes):
        r, own = lot[k], Kept()
        if r.moments is not False:
            steps = len(r.plan) + (int(r.moments["step"]) if r.moments else 0)
            own = moments.moments_of(optimizer, params, k, r.theta, steps)
        out.append(fitted(r, take_lane(home, i, r.theta), told[i], lr_sum, own))
    return out


def _descend(lot: Sequence[Fit], step: int, base: Mapping[str, Tensor] | None, params: Mapping[str, Tensor],
             frozen: Mapping[str, Tensor], terms: Sequence[tuple[Term, Mapping[str, Tensor]]]) -> Tensor:
    """Leave each lane's own gradient in the parameters (the lanes' losses are added); gives the loss that may be told
    [K]: none (0) where training is private."""
    model, trees, objective, spec = lot[0].model, [r.theta for r in lot], lot[0].objective, lot[0].spec
    for p in params.values():
        p.grad = None
    if private := [r.private for r in lot if r.private]:
        if lot[0].noise is not None:
            raise CompositionError("space.dropout and local.neftune do not fit together with the clipping of single "
                                   "examples' gradients, where nothing is drawn; leave them out")
        rows, sides = zip(*(_part(r, r.plan[step]) for r in lot), strict=True)
        descended = private_objective(model, rows, private, trees, base, params, frozen, objective, sides)
        _penalized(descended.sum(), terms, params, len(lot)).backward()
        return torch.zeros_like(descended)
    parts = max(1, *(-(-len(r.plan[step]) // spec.batch_size) for r in lot))
    total: Any = 0.0
    count: Any = 0.0
    with model.using(trees, base, params | frozen), checkpointed(model, spec.checkpointing):
        for i in range(parts):
            rows: Any
            rows, sides = zip(*(_part(r, slice_of(r.plan[step], i, parts, spec)) for r in lot), strict=True)
            if spec.packing:
                rows = _packed(rows, objective)
            with noisy(model, [r.noise for r in lot], (step, i), list(map(len, rows)), spec.neftune):
                if parts == 1:
                    loss = lane_losses(objective, model, rows, sides)
                    _penalized(loss.sum(), terms, params, len(lot)).backward()
                    return loss.detach()
                summed, targets = lane_sums(objective, model, rows, sides)
                summed.sum().backward()
                total, count = total + summed.detach(), count + targets.detach()
    count = count.clamp(min=1)
    for p in params.values():  # the mean over all targets of the step, as if it had been one part
        if p.grad is not None:
            p.grad.div_(count.view(-1, *[1] * (p.dim() - 1)).to(p.dtype))
    if terms:
        _penalized(total.new_zeros(()), terms, params, len(lot)).backward()
    return total / count


def _packed(rows: Sequence[Sequence[Encoded]], objective: Objective) -> list[list[Encoded]]:
    if objective.needs:
        raise CompositionError(f"local.packing = true: objective '{objective.name}' looks at each row by itself; leave "
                               "it out")
    return [packed(lane) for lane in rows]


def _part(r: Fit, at: np.ndarray) -> tuple[list[Encoded], Side]:
    return [r.rows[i] for i in at], taken(r.side, at)


def slice_of(at: np.ndarray, i: int, parts: int, spec: LocalSpec) -> np.ndarray:
    """The rows of part `i` of a step."""
    return at if parts == 1 else at[i * spec.batch_size : (i + 1) * spec.batch_size]


def _penalized(total: Tensor, terms: Sequence[tuple[Term, Mapping[str, Tensor]]], params: Mapping[str, Tensor],
               live: int) -> Tensor:
    for term, tensors in terms:
        total = total + term.loss(params, {n: t[:live] for n, t in tensors.items()}).sum()
    return total


def _step(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
    """One optimizer step for all lanes."""
    if clip_norm is not None:
        grads = [p.grad for p in params.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).pow(2).sum(1) for g in grads]).sum(0).sqrt()  # [K]
        shrink = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(shrink.view(-1, *[1] * (g.dim() - 1)))
    optimizer.step()


def _shrink(params: dict[str, Tensor], optimizer: torch.optim.Optimizer, live: int,
            spec: LocalSpec) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Keep the first `live` lanes of the parameters and of the optimizer's state."""
    kept = {n: p.detach()[:live].clone().requires_grad_() for n, p in params.items()}
    fresh = spec.optimizer_over(list(kept.values()), list(kept))
    for old, new in zip(params.values(), kept.values(), strict=True):
        fresh.state[new] = {k: v[:live].clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                            for k, v in optimizer.state[old].items()}
    return kept, fresh


def fitted(r: Fit, theta: dict[str, Tensor], loss: Tensor, lr_sum: float, own: Kept) -> Fitted:
    """What a fit tells of itself; `loss` is summed over its steps."""
    if r.private:  # whom its batches drew is a secret, so their size is told as expected
        return Fitted(theta, 0.0, len(r.plan), round(r.private.batch * len(r.plan)), 0, lr_sum, own)
    if not r.plan:  # no step was asked for
        return Fitted(theta, 0.0, 0, 0, 0, 0.0, own)
    seen = np.concatenate(list(r.plan))
    return Fitted(theta, float(loss) / len(r.plan), len(r.plan), len(seen), int(r.lengths[seen].sum()), lr_sum, own)

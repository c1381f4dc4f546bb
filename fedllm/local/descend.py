"""One step of the recipe's optimizer along gradients that came from elsewhere: the same bits as in a fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedllm.core.payload import Kept, Tree
from fedllm.local import moments
from fedllm.local.spec import LocalSpec


def descended(theta: Mapping[str, Tensor], slopes: Mapping[str, Tensor], spec: LocalSpec,
              before: Mapping[str, Tensor] | None = None) -> tuple[Tree, Kept]:
    """Trainables and the optimizer's state after the step, as the only one of a round; `before` is the state to go on
    from, none at first."""
    params = {n: t.detach().clone()[None].requires_grad_() for n, t in theta.items()}
    optimizer = spec.optimizer_over(list(params.values()), list(params))
    if before:
        moments.go_on(optimizer, params, [dict(before)])
    for group in optimizer.param_groups:
        group["lr"] = spec.rate(0, 1) * group.get("times", 1.0)
    for n, p in params.items():
        p.grad = slopes[n].to(p.dtype)[None]
    optimizer.step()
    taken = 1 + (int(before["step"]) if before else 0)
    return {n: p.detach()[0] for n, p in params.items()}, moments.moments_of(optimizer, params, 0, dict(theta), taken)

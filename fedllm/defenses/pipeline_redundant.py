"""Pipeline training in which each stage recomputes the one before it, and a step goes on without those accused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.local.flops import Work

Loss = Callable[[Tensor], Tensor]
Send = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What one optimizer step came to."""

    loss: float
    accused: frozenset[int]
    """Stages that the step went on without; empty when no lie was found."""
    work: Work
    """What all stages computed for it: copies, and tries that were given up, included."""


def honest(way: str, stage: int, x: Tensor) -> Tensor:
    """What an honest stage sends."""
    return x


class Pipeline:
    """Stages in a row, each at another party, that train one residual model together.

    With `redundant` (Lu et al., ICML 2024) stage i + 1 holds a copy of stage i, updated in step. It recomputes what i
    sends forward, and from the gradient that it sent to i what i must send back; any difference above `rtol` (0: any
    bit) is a lie of one of the two, and nobody can tell whose. The step is done again without both (residual streams
    pass them by), and they and the stage before them are not updated, so that copies stay equal. Two neighbors that
    collude defeat it, and so does a stage whose weights are poisoned in training.
    """

    def __init__(self, stages: Sequence[nn.Module], optimizer: Callable[[Any], torch.optim.Optimizer], *,
                 redundant: bool = True, relay: bool = True, rtol: float = 0.0) -> None:
        """`relay`: a broker passes all messages on, so the stage before cannot be the liar."""
        self.stages, self.redundant, self.relay, self.rtol = list(stages), redundant, relay, rtol
        inner = range(1, len(self.stages) - 1) if redundant else ()
        self.copies = {i: copy.deepcopy(self.stages[i]) for i in inner}  # held by stage i + 1
        self.optimizers = {i: optimizer(s.parameters()) for i, s in enumerate(self.stages)}
        self.copied = {i: optimizer(s.parameters()) for i, s in self.copies.items()}
        self.strikes: Counter[int] = Counter()
        self.work = Work()

    def step(self, x: Tensor, loss: Loss, send: Send = honest) -> Step:
        """One optimizer step on the micro-batch x; `send` is what stages really send."""
        accused: frozenset[int] = frozenset()
        self.work = Work()
        while True:
            got = self._try(x, loss, send, accused)
            if isinstance(got, float):
                break
            self.strikes.update([got])
            accused |= {i for i in (got, got + 1, *(() if self.relay else (got - 1,)))
                        if 0 < i < len(self.stages) - 1}
        frozen = accused | {min(accused) - 1} if accused else accused
        for mine in (self.optimizers, self.copied):
            for i, optimizer in mine.items():
                if i not in frozen:
                    optimizer.step()
        return Step(got, accused, self.work)

    def _try(self, x: Tensor, loss: Loss, send: Send, skip: frozenset[int]) -> float | int:
        """Forward and backward without the stages in `skip`: the loss, or the stage whose message was found wrong."""
        for optimizer in (*self.optimizers.values(), *self.copied.values()):
            optimizer.zero_grad(set_to_none=True)
        kept: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        h = x
        for i, stage in enumerate(self.stages):
            if i in skip:
                continue
            both = [stage, *([self.copies[i]] if i in self.copies else [])]
            runs = [_run(one, h) for one in both]
            self.work += _passed(both, runs[0][1], 2)
            h = send("forward", i, runs[0][1].detach())
            if len(runs) > 1 and not self._same(h, runs[1][1].detach()):
                return i
            kept.append((i, runs))
        last = h.requires_grad_()
        value = loss(last)
        (g,) = torch.autograd.grad(value, last)
        for i, runs in reversed(kept):
            self.work += _passed([self.stages[i]] * len(runs), g, 4)
            for _, out in runs:
                out.backward(g)
            if i == 0:
                break
            g = send("backward", i, runs[0][0].grad)  # type: ignore[arg-type]
            if len(runs) > 1 and not self._same(g, runs[1][0].grad):  # type: ignore[arg-type]
                return i
        return float(value.detach())

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return torch.equal(a, b) if self.rtol == 0 else torch.allclose(a, b, rtol=self.rtol, atol=self.rtol)

    def forward(self, x: Tensor) -> Tensor:
        """The whole model, for tests."""
        with torch.no_grad():
            for stage in self.stages:
                x = stage(x)
        return x


def _passed(stages: Sequence[nn.Module], x: Tensor, each: int) -> Work:
    """The work by which these stages come to x [..., width], or go back from its gradient: `each` operations a weight
    and token."""
    tokens = x.numel() // x.shape[-1]
    return Work(tokens * len(stages), float(each * tokens * sum(p.numel() for s in stages for p in s.parameters())))


def _run(stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(a leaf with the stage's input, its output)."""
    given = x.detach().clone()
    if given.is_floating_point():
        given.requires_grad_()
    return given, stage(given)

"""Acting with a decision transformer, for many clients in one forward: each episode goes on behind its own prompt."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.local.logs import Shown
from fedllm.local.policy import Episode, Rollout, Trace, play
from fedllm.local.requests import Limits


@dataclass(frozen=True)
class Decide(Rollout):
    """At every step it reads the last `context` steps behind the prompt of its environment, an entry of `shown`."""

    shown: Sequence[Shown] = ()
    context: int = 1

    @property
    def group(self) -> Hashable:
        return (*super().group, self.context, self.shown[0].tokens, len(self.shown[0].did))

    @property
    def wide(self) -> int:
        return self.context + self.shown[0].tokens


def run_decisions(requests: Sequence[Decide], limits: Limits) -> list[list[Episode]]:
    """Each request's episodes; what is still to be earned begins at the prompt's target and falls by what is earned."""
    context = requests[0].context
    fronts = [(shown, env.max_steps) for r in requests for shown, env in zip(r.shown, r.envs, strict=True)]

    def read(model: Any, x: Tensor, where: Mapping[int, int], traces: Sequence[Sequence[Trace]]) -> Tensor:
        n, size = x.shape
        like = fronts[0][0].parts
        parts = {"togo": np.zeros((n, context, 2), np.float32), "seen": np.zeros((n, context, size), np.float32),
                 "did": np.zeros((n, context), np.int64),
                 **{name: np.zeros((n, *part.shape), part.dtype) for name, part in like.items()}}
        last, now = np.zeros(n, np.int64), x.cpu().numpy()
        for i, row in where.items():
            front, longest = fronts[i]
            paid = np.array([reward for *_, reward in traces[i]])
            left = front.target - np.concatenate([[0.0], paid.cumsum()]) / longest  # before each step, [t + 1]
            first = max(0, len(left) - context)
            kept, k = traces[i][first:], len(left) - first
            parts["togo"][row, :k] = np.stack([left[first:], np.arange(first, len(left)) / longest], 1)
            parts["seen"][row, :k] = [*(seen for seen, *_ in kept), now[row]]
            parts["did"][row, : k - 1], last[row] = [did for _, did, _ in kept], k - 1
            for name, part in front.parts.items():
                parts[name][row] = part
        model.stack.rows = n
        z = model.net.decide({name: torch.from_numpy(part).to(model.device) for name, part in parts.items()})
        return z[torch.arange(n, device=z.device), torch.from_numpy(last).to(z.device)]

    return play(requests, limits, read)

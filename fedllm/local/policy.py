"""Acting and learning from it, for many clients in one forward: episodes in lockstep, and policy-gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.environments.env import Bounded
from fedllm.local.requests import Fitted, Limits, Request
from fedllm.local.spec import LocalSpec
from fedllm.spaces.space import stack_lanes, take_lane, tree_to

Trace = tuple[np.ndarray, int, float]
"""A step: what was seen, what was done, what it brought."""
Reads = Callable[[Any, Tensor, Mapping[int, int], Sequence[Sequence[Trace]]], Tensor]
"""(model, what is seen [K*E, size], episode -> its row there, what was before in each) -> logits [K*E, actions]."""


@dataclass(frozen=True)
class Episode:
    """What happened: observations fp32 [T, size], actions [T], rewards [T], and whether it was cut off by max_steps."""

    seen: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    cut: bool

    @property
    def total(self) -> float:
        """The sum of the rewards."""
        return float(self.rewards.sum())


@dataclass(frozen=True)
class Rollout(Request):
    """Act in these environments with the policy `theta`: one episode in each, from its seed."""

    envs: Sequence[Bounded]
    seeds: Sequence[int]
    greedy: bool = False

    @property
    def group(self) -> Hashable:
        return (*super().group, self.greedy)

    @property
    def most(self) -> int:
        """Steps that it may take."""
        return sum(e.max_steps for e in self.envs)

    @property
    def wide(self) -> int:
        """Tokens that a step reads."""
        return 1

    @property
    def reads(self) -> int:
        return self.most * self.wide


@dataclass(frozen=True)
class Improve(Request):
    """Descend - sum_n w_n log pi(a_n | o_n) / N for `steps` steps."""

    seen: np.ndarray  # fp32 [N, size]
    actions: np.ndarray  # int64 [N]
    weights: np.ndarray  # fp64 [N]
    spec: LocalSpec
    steps: int = 1

    @property
    def group(self) -> Hashable:
        return (*super().group, self.spec, self.steps)


def run_rollouts(requests: Sequence[Rollout], limits: Limits) -> list[list[Episode]]:
    """Each request's episodes; at every step all that still go on share a forward."""

    def read(model: Any, x: Tensor, where: Mapping[int, int], traces: Sequence[Sequence[Trace]]) -> Tensor:
        return logits(model, x)

    return play(requests, limits, read)


def play(requests: Sequence[Rollout], limits: Limits, read: Reads) -> list[list[Episode]]:
    """Each request's episodes by what `read` says of all that still go on."""
    model, k, e = requests[0].model, len(requests), max(len(r.envs) for r in requests)
    at = [(lane, j, env) for lane, r in enumerate(requests) for j, env in enumerate(r.envs)]
    draws = [np.random.default_rng([requests[lane].seeds[j], 1]) for lane, j, _ in at]
    now = [env.reset(requests[lane].seeds[j]) for lane, j, env in at]
    traces: list[list[Trace]] = [[] for _ in at]
    live = list(range(len(at)))
    stacked = tree_to(stack_lanes([r.theta for r in requests]), model.device)
    dtype = next(iter(stacked.values())).dtype
    while live:
        limits.go_on()
        x = np.zeros((k, e, len(now[live[0]])), np.float32)
        for i in live:
            x[at[i][0], at[i][1]] = now[i]
        with torch.no_grad(), model.using([r.theta for r in requests], requests[0].base, stacked):
            z = read(model, torch.from_numpy(x.reshape(k * e, -1)).to(model.device, dtype),
                     {i: at[i][0] * e + at[i][1] for i in live}, traces)
        p = z.double().softmax(-1).view(k, e, -1).cpu().numpy()
        going = []
        for i in live:
            lane, j, env = at[i]
            mine = p[lane, j]
            action = int(mine.argmax()) if requests[lane].greedy else int(
                min(np.searchsorted(mine.cumsum(), draws[i].random()), len(mine) - 1))
            to, reward, over = env.step(action)
            traces[i].append((now[i], action, reward))
            now[i] = to
            going += [] if over else [i]
        live = going
    out: list[list[Episode]] = [[] for _ in requests]
    for (lane, _, env), trace in zip(at, traces, strict=True):
        seen, actions, rewards = zip(*trace, strict=True)
        out[lane].append(Episode(np.stack(seen), np.array(actions), np.array(rewards), env.cut))
    return out


def run_improves(requests: Sequence[Improve], limits: Limits) -> list[Fitted]:
    """The policies after their steps; shorter lanes are filled with observations of weight 0."""
    model, spec, k = requests[0].model, requests[0].spec, len(requests)
    n = max(len(r.actions) for r in requests)
    trees = [r.theta for r in requests]
    params = {name: t.detach().clone().requires_grad_() for name, t in tree_to(stack_lanes(trees),
                                                                               model.device).items()}
    dtype = next(iter(params.values())).dtype
    filled = [(np.pad(r.seen, ((0, n - len(r.actions)), (0, 0))), np.pad(r.actions, (0, n - len(r.actions))),
               np.pad(r.weights / max(1, len(r.actions)), (0, n - len(r.actions)))) for r in requests]
    x, a, w = (torch.from_numpy(np.concatenate(part)).to(model.device) for part in zip(*filled, strict=True))
    optimizer, lr_sum, loss = spec.optimizer_over(list(params.values())), 0.0, torch.zeros(k)
    for step in range(requests[0].steps):
        limits.go_on()
        lr = spec.rate(step, requests[0].steps)
        lr_sum += lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        with model.using(trees, requests[0].base, params):
            said = logits(model, x.to(dtype)).log_softmax(-1).gather(1, a[:, None])[:, 0]  # [K*N]
        loss = -(said * w.to(dtype)).view(k, n).sum(1)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()  # lanes do not meet: each one's gradient is its own
        _clip(list(params.values()), spec.clip_norm)
        optimizer.step()
    home = {name: t.detach().cpu() for name, t in params.items()}
    return [Fitted(take_lane(home, i, r.theta), float(loss[i].detach()), r.steps, len(r.actions) * r.steps,
                   len(r.actions) * r.steps, lr_sum) for i, r in enumerate(requests)]


def _clip(params: Sequence[Tensor], most: float | None) -> None:
    """Each lane's gradient to a norm of `most`."""
    if most is None:
        return
    norms = torch.stack([p.grad.flatten(1).pow(2).sum(1) for p in params if p.grad is not None]).sum(0).sqrt()
    shrink = (most / (norms + 1e-6)).clamp(max=1.0)
    for p in params:
        if p.grad is not None:
            p.grad.mul_(shrink.view(-1, *[1] * (p.dim() - 1)))


def logits(model: object, x: Tensor) -> Tensor:
    """Observations [K*N, size] -> logits [K*N, actions]."""
    model.stack.rows = len(x)  # type: ignore[attr-defined]
    return model.net(x)  # type: ignore[attr-defined]

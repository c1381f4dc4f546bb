"""QMIX: agents that choose apart and are taught together, by a mixing of their values that grows with each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream

HIDDEN = 32


def made(seed: int, state: int, actions: int) -> Tree:
    """One Q-net for all agents and a mixing net, fp64."""
    rng = torch_stream(seed, "qmix")
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64) * shape[-1] ** -0.5  # noqa: E731
    zero = lambda n: torch.zeros(n, dtype=torch.float64)  # noqa: E731
    return {"q/w1": draw(HIDDEN, state), "q/b1": zero(HIDDEN), "q/w2": draw(actions, HIDDEN), "q/b2": zero(actions),
            "mix/w": draw(HIDDEN, 2 * state), "mix/b": zero(HIDDEN), "mix/out": draw(1, HIDDEN),
            "base/w": draw(1, state), "base/b": zero(1)}


def values(net: Tree, s: Tensor) -> Tensor:
    """Q of every action [K, actions] in each agent's state s [K, state]."""
    return torch.tanh(s @ net["q/w1"].T + net["q/b1"]) @ net["q/w2"].T + net["q/b2"]


def mixed(net: Tree, s: Tensor, q: Tensor) -> Tensor:
    """Q_tot = sum_k |w(s_k, mean s)| q_k / K + b(mean s): monotone in each q_k, whatever the number of agents."""
    mean = s.mean(0)
    seen = torch.cat([s, mean.expand_as(s)], 1)
    w = (torch.tanh(seen @ net["mix/w"].T + net["mix/b"]) @ net["mix/out"].T)[:, 0].abs()
    return (w * q).mean() + (mean @ net["base/w"].T + net["base/b"])[0]


@dataclass(frozen=True)
class Step:
    """What was seen, done and paid, and what came of it."""

    s: Tensor  # [K, state]
    actions: Tensor  # int64 [K]
    reward: float
    after: Tensor  # [K', state]


def taught(net: Tree, steps: Sequence[Step], gamma: float, lr: float, passes: int = 8) -> Tree:
    """Descend (r + gamma Q_tot(s', argmax) - Q_tot(s, a))^2 over these steps; targets are the net's own before."""
    with torch.no_grad():
        wanted = [x.reward + gamma * mixed(net, x.after, values(net, x.after).max(1).values) for x in steps]
    live = {n: t.clone().requires_grad_() for n, t in net.items()}
    optimizer = torch.optim.Adam(list(live.values()), lr)
    for _ in range(passes):
        loss = torch.stack([(mixed(live, x.s, values(live, x.s).gather(1, x.actions[:, None])[:, 0]) - y) ** 2
                            for x, y in zip(steps, wanted, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: t.detach() for n, t in live.items()}

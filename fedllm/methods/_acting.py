"""What methods share whose small policies act: returns, a critic that stays at home, and a test on fixed episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedllm.core.client import Client
from fedllm.core.payload import Payload, Tree


def returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_(t+1), from the end."""
    out, g = np.zeros(len(rewards)), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        g = out[t] = rewards[t] + gamma * g
    return out


def seen_in(episodes: Sequence[Any], gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps: observations [N, size], actions [N], and what followed from each G [N]."""
    return (np.concatenate([e.seen for e in episodes]), np.concatenate([e.actions for e in episodes]),
            np.concatenate([returns(e.rewards, gamma) for e in episodes]))


def worth(client: Client, seen: np.ndarray) -> np.ndarray:
    """V(o) = v . o, [N], by the client's own critic; for one-hot observations a table."""
    v = client.memory.get("critic", torch.zeros(seen.shape[1], dtype=torch.float64))
    return seen.astype(np.float64) @ v.numpy()


def learn(client: Client, seen: np.ndarray, g: np.ndarray, rate: float) -> None:
    """v <- v + rate (sum_t (G_t - V(o_t)) o_t) / (sum_t o_t^2), entry by entry."""
    v = client.memory.get("critic", torch.zeros(seen.shape[1], dtype=torch.float64))
    error, o = g - worth(client, seen), seen.astype(np.float64)
    client.memory["critic"] = v + rate * torch.from_numpy((o.T @ error) / np.maximum(1, (o * o).sum(0)))


def tested(client: Client, theta: Tree, rows: Sequence[Any], episodes: int) -> Payload:
    """Mean return in each environment, over the same episodes at every test, and how many were cut off."""
    if not rows:
        return {"n": 0}
    done = client.rollout(theta, episodes, on=rows)
    return {"n": len(done), **figures(done)}


def figures(done: Sequence[Any]) -> dict[str, float]:
    """What episodes come to."""
    return {"return": float(np.mean([e.total for e in done])), "cut": float(np.mean([e.cut for e in done]))}

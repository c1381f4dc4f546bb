"""Linear bandits on hidden states: what is seen of a text, and one ridge regression an action, kept as sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.rng import numpy_stream
from fedllm.data.encode import IGNORE
from fedllm.models.batch import Batch
from fedllm.models.model import Model


def last_state(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: the last hidden state of each row's last token before its answer [N, d], fp64."""
    first = (batch.labels[:, 1:] != IGNORE).int().argmax(1)
    return model.hidden(batch)[torch.arange(len(first), device=first.device), first].double()


def states(client: Any, texts: list[str]) -> np.ndarray:
    """The frozen model's hidden state at each text's end [texts, d]."""
    rows = [{"prompt": t, "response": "."} for t in texts]
    return client.measure({}, rows, last_state)


@functools.lru_cache(maxsize=8)
def projection(wide: int, dim: int) -> np.ndarray:
    """A random map [wide, dim], the same for everybody."""
    return numpy_stream("projection", wide, dim).normal(0, dim**-0.5, (wide, dim))


def features(h: np.ndarray, mean: np.ndarray, deviation: np.ndarray, dim: int) -> np.ndarray:
    """Standardized, projected, of length 1, and a constant: x [texts, dim + 1]."""
    z = (h - mean) / np.maximum(deviation, 1e-6) @ projection(h.shape[1], dim)
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
    return np.concatenate([z, np.ones((len(z), 1))], 1)


class Arms:
    """A_a = lam I + sum x x^T and b_a = sum r x of each action, with A_a^-1 kept by rank-one updates."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        """`a` [actions, d, d] and `b` [actions, d] as they stand; `da`, `db` and `count` are what is added."""
        self.inverse, self.b = np.linalg.inv(a), b.copy()
        self.da, self.db, self.count = np.zeros_like(a), np.zeros_like(b), np.zeros(len(a))

    def scores(self, x: np.ndarray, alpha: float) -> np.ndarray:
        """theta_a . x + alpha sqrt(x^T A_a^-1 x) of each action [actions], theta_a = A_a^-1 b_a."""
        seen = self.inverse @ x  # [actions, d]
        return (seen * self.b).sum(1) + alpha * np.sqrt(np.maximum(seen @ x, 0))

    def learn(self, action: int, x: np.ndarray, reward: float) -> None:
        """A_a += x x^T, b_a += r x; (A + x x^T)^-1 = A^-1 - A^-1 x x^T A^-1 / (1 + x^T A^-1 x)."""
        ix = self.inverse[action] @ x
        self.inverse[action] -= np.outer(ix, ix) / (1 + x @ ix)
        self.b[action] += reward * x
        self.da[action] += np.outer(x, x)
        self.db[action] += reward * x
        self.count[action] += 1


def chosen(scores: np.ndarray, admissible: Sequence[bool]) -> int:
    """The best action of those that may be taken; of equals the first."""
    return int(np.where(admissible, scores, -np.inf).argmax())


def opened(client: Any, rows: Sequence[Any], episodes: int, rng: np.random.Generator) -> list[Any]:
    """So many episodes in each of these environments, begun; `rng` gives their seeds."""
    envs = [client.env(rng, row) for row in rows for _ in range(episodes)]
    for e in envs:
        e.reset()
    return envs


def played(client: Any, envs: Sequence[Any], arms: Arms, see: Callable[[np.ndarray], np.ndarray], alpha: float,
           learns: bool) -> list[float]:
    """The episodes' returns; all that go on share a forward, and what one learns the next already knows.

    The reward of a step, 1 where it was paid, is of the action that was taken alone.
    """
    totals, live = [0.0] * len(envs), list(range(len(envs)))
    while live:
        going, x = [], see(states(client, [envs[i].text for i in live]))  # [live, dim + 1]
        for i, xi in zip(live, x, strict=True):
            action = chosen(arms.scores(xi, alpha), envs[i].admissible)
            _, reward, over = envs[i].step(action)
            totals[i] += reward
            if learns:
                arms.learn(action, xi, float(reward > 0))
            going += [] if over else [i]
        live = going
    return totals

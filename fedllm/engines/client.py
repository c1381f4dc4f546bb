"""The client as its functions see it, for every engine: heavy work becomes requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.client import SERVER, ClientInfo, Profile
from fedllm.core.payload import Tree
from fedllm.engines.learning import Learning
from fedllm.engines.reading import Reading
from fedllm.environments.env import Bounded
from fedllm.environments.registry import bounded, placed
from fedllm.local.decide import Decide
from fedllm.local.logs import Shown
from fedllm.local.policy import Episode, Improve, Rollout
from fedllm.local.requests import Fitted


class ClientCall(Learning, Reading):
    """One client during one call of one of its functions."""

    def env(self, rng: np.random.Generator, row: Mapping[str, Any] | None = None) -> Bounded:
        """The client's environment (of several the first, or that of `row`); its episodes are seeded by `rng`."""
        return bounded(self.data[0] if row is None else row, rng)

    def rollout(self, theta: Tree, episodes: int, *, rng: np.random.Generator | None = None, greedy: bool = False,
                on: Sequence[Mapping[str, Any]] | None = None) -> list[Episode]:
        """So many episodes in the client's environment (in each, where it has several), or in each of those of the rows
        `on`; without `rng` their seeds are the same whoever asks and whenever, for tests."""
        envs, seeds = placed(list(self.data if on is None else on), episodes, rng or np.random.default_rng(0))
        return self._ask(Rollout(self.id, self.model, theta, None, envs, seeds, greedy))

    def decide(self, theta: Tree, episodes: int, rows: Sequence[Mapping[str, Any]], shown: Sequence[Shown], *,
               context: int) -> list[Episode]:
        """So many episodes in the environment of each row, by a decision transformer that reads its last `context`
        steps behind that environment's prompt; greedy, and on the seeds on which `rollout` tests."""
        envs, seeds = placed(rows, episodes, np.random.default_rng(0))
        fronts = [s for s in shown for _ in range(episodes)]
        return self._ask(Decide(self.id, self.model, theta, None, envs, seeds, True, fronts, context))

    def improve(self, theta: Tree, seen: np.ndarray, actions: np.ndarray, weights: np.ndarray, *,
                steps: int = 1) -> Fitted:
        """Policy-gradient steps on what was done, by the recipe's optimizer."""
        self._bounds.work(steps, steps * len(actions))
        return self._ask(Improve(self.id, self.model, theta, None, seen, actions, weights, self.training, steps))


def server_info() -> ClientInfo:
    """The server as a client of its own engine."""
    return ClientInfo(SERVER, 0, Profile())

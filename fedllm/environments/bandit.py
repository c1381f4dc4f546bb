"""A bandit with contexts: each context has a best arm, shared by all layouts but for some of the client's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import Scene, Step, layout


@dataclass(frozen=True)
class Bandit(Scene):
    """One pull for each of `pulls` contexts drawn at random (one-hot); the best arm pays 1 with probability `best`."""

    arms: int = knob(4, "arms to pull", ge=2)
    contexts: int = knob(6, "contexts, each with a best arm", ge=1)
    pulls: int = knob(10, "pulls of an episode", ge=1)
    best: float = knob(0.9, "probability that the best arm pays", gt=0, le=1)
    other: float = knob(0.2, "probability that another arm pays", ge=0, lt=1)
    own: float = knob(0.0, "share of contexts whose best arm is the layout's own", ge=0, le=1)
    layout: int = layout

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.contexts

    @property
    def actions(self) -> int:  # type: ignore[override]
        return self.arms

    def env(self) -> Arms:
        return Arms(self)

    def winners(self) -> np.ndarray:
        """Each context's best arm [contexts]."""
        shared = numpy_stream("bandit").integers(self.arms, size=self.contexts)
        rng = numpy_stream(self.layout, "bandit")
        return np.where(rng.random(self.contexts) < self.own, rng.integers(self.arms, size=self.contexts), shared)


class Arms:
    """The pulls."""

    def __init__(self, scene: Bandit) -> None:
        self.scene, self.winners = scene, scene.winners()

    def reset(self, seed: int) -> np.ndarray:
        self.rng, self.left = np.random.default_rng(seed), self.scene.pulls
        return self._next()

    def step(self, action: int) -> Step:
        pays = self.scene.best if action == self.winners[self.context] else self.scene.other
        reward, self.left = float(self.rng.random() < pays), self.left - 1
        return self._next(), reward, self.left == 0

    def _next(self) -> np.ndarray:
        self.context = int(self.rng.integers(self.scene.contexts))
        seen = np.zeros(self.scene.contexts, np.float32)
        seen[self.context] = 1
        return seen

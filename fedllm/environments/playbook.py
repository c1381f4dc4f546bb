"""Writing skills: three steps are chosen for a kind of task, and a noisy executor follows them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import Scene, Step, layout

KINDS, STEPS, CHOICES = 4, 5, 3


@dataclass(frozen=True)
class Playbook(Scene):
    """A generation is `CHOICES` steps of `STEPS`; then the executor tries the skill `tries` times, and the share of its
    successes is the last choice's reward. What was tried before, and how well it did, is seen while the next is chosen.

    Which steps suit a kind of task is alike for all layouts; `kinds` of the four are a layout's own.
    """

    generations: int = knob(3, "skills that are written one after the other for a task", ge=1, le=10)
    tries: int = knob(4, "times that the executor follows a skill", ge=1)
    kinds: int = knob(1, "kinds of task of this layout, of the four", ge=1, le=KINDS)
    kind: int = knob(-1, "this kind alone; -1: any of the layout's", ge=-1, lt=KINDS)
    base: float = knob(0.1, "probability that the executor succeeds with no step right", ge=0, lt=1)
    layout: int = layout
    size, actions = KINDS + CHOICES + 2 * CHOICES * STEPS + 1, STEPS

    def env(self) -> Writing:
        return Writing(self)

    @staticmethod
    def best(kind: int) -> list[int]:
        """The step that suits each place of a skill."""
        return numpy_stream("playbook", kind).integers(STEPS, size=CHOICES).tolist()

    def own(self) -> list[int]:
        """The layout's kinds of task."""
        return [self.kind] if self.kind >= 0 else [(self.layout + i) % KINDS for i in range(self.kinds)]


class Writing:
    """Skill after skill for one task."""

    def __init__(self, scene: Playbook) -> None:
        self.scene = scene

    def reset(self, seed: int) -> np.ndarray:
        self.rng = np.random.default_rng(seed)
        own = self.scene.own()
        self.kind, self.written, self.before = own[int(self.rng.integers(len(own)))], list[int](), list[int]()
        self.paid, self.done = 0.0, 0
        return self._seen()

    def step(self, action: int) -> Step:
        self.written.append(action)
        if len(self.written) < CHOICES:
            return self._seen(), 0.0, False
        right = sum(a == b for a, b in zip(self.written, self.scene.best(self.kind), strict=True))
        p = self.scene.base + (1 - self.scene.base) * right / CHOICES
        self.paid = float((self.rng.random(self.scene.tries) < p).mean())
        self.before, self.written, self.done = self.written, [], self.done + 1
        return self._seen(), self.paid, self.done == self.scene.generations

    def _seen(self) -> np.ndarray:
        """The kind, the place, what was written so far, the last skill and what it was worth."""
        seen = np.zeros(self.scene.size, np.float32)
        seen[self.kind] = seen[KINDS + len(self.written)] = 1
        for i, a in enumerate(self.written):
            seen[KINDS + CHOICES + i * STEPS + a] = 1
        for i, a in enumerate(self.before):
            seen[KINDS + CHOICES + (CHOICES + i) * STEPS + a] = 2 * self.paid - 1
        seen[-1] = self.paid
        return seen

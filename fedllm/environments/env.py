"""What an environment is: `reset(seed)`, `step(action)`, and a limit on how long an episode may last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from fedllm.core.errors import RunError
from fedllm.core.knobs import Knobs, knob
from fedllm.environments.rules import NONE, Rules

Step = tuple[np.ndarray, float, bool]
"""(observation fp32 [size], reward, whether the episode has ended)."""


class Env(Protocol):
    """One episode after another; all randomness of an episode comes from the seed that it was reset with."""

    def reset(self, seed: int) -> np.ndarray:
        """The first observation, fp32 [size]."""
        ...

    def step(self, action: int) -> Step:
        """What follows from the action."""
        ...


class Scene(Knobs):
    """The parameters of an environment: a frozen dataclass of knobs, and what they make."""

    size: ClassVar[int]
    """Length of an observation."""
    actions: ClassVar[int]
    """How many actions there are, numbered from 0."""
    habits: ClassVar[Mapping[str, Callable[[np.ndarray], int]]] = {}
    """Ways of acting for which nothing is learned, by name: what is seen -> an action. They fill logs, and what was
    learned is held against them."""

    def cues(self) -> np.ndarray:
        """What is known of the place before anything is done there, fp32 [cues]; where nothing is, [0]."""
        return np.zeros(0, np.float32)

    def env(self) -> Env:
        """A fresh environment with these parameters."""
        raise NotImplementedError

    def open(self, rules: Rules = NONE) -> Env:
        """The same under a site's rules for its tools, if it has any."""
        return self.env()


layout = knob(0, "seed of what differs from client to client", ge=0)
"""Every scene has this knob; where a recipe does not set it, each client gets a number of its own."""


class InWords:
    """An environment that is acted in by lines of text as well as by numbers (`environments/words.py`)."""

    text: str
    """What was told last."""

    def say(self, line: str) -> Step:
        """What a line leads to."""
        raise NotImplementedError

    def commands(self) -> Sequence[str]:
        """The lines behind the numbers, as they stand now."""
        raise NotImplementedError

    def admissible(self) -> Sequence[bool]:
        """Which of them may be said."""
        raise NotImplementedError


class Bounded:
    """An environment whose episodes end after `max_steps` at the latest; `cut`: the last one was cut off."""

    def __init__(self, scene: Scene, max_steps: int, rng: np.random.Generator, rules: Rules = NONE) -> None:
        """`rng` gives the seeds of episodes that are reset without one; `rules` are the site's for tools."""
        self.scene, self.max_steps, self.rng, self._env = scene, max_steps, rng, scene.open(rules)
        self.steps, self.cut, self._over = 0, False, True

    def reset(self, seed: int | None = None) -> np.ndarray:
        """The first observation; RunError when it is not of the declared size."""
        self.steps, self.cut, self._over = 0, False, False
        return self._seen(self._env.reset(int(self.rng.integers(2**31)) if seed is None else seed))

    def step(self, action: int) -> Step:
        """What follows; RunError for an action that is none, and after the episode's end."""
        self._goes_on()
        if not 0 <= action < self.scene.actions:
            raise RunError(f"{type(self.scene).__name__}: action {action} is none of 0 to {self.scene.actions - 1}")
        return self._came(*self._env.step(int(action)))

    def say(self, line: str) -> Step:
        """An action in words: any line, also one that is no command; RunError where the environment has no words."""
        self._goes_on()
        return self._came(*self._in_words.say(line))

    @property
    def text(self) -> str:
        """What was told last, in words."""
        return self._in_words.text

    @property
    def commands(self) -> list[str]:
        """The lines behind the numbered actions, as they stand now."""
        return list(self._in_words.commands())

    @property
    def admissible(self) -> list[bool]:
        """Which of them may be said: not those that call a tool that is off."""
        return list(self._in_words.admissible())

    @property
    def _in_words(self) -> InWords:
        if isinstance(self._env, InWords):
            return self._env
        raise RunError(f"{type(self.scene).__name__} has no words: its actions are the numbers 0 to "
                       f"{self.scene.actions - 1}")

    def _goes_on(self) -> None:
        if self._over:
            raise RunError(f"{type(self.scene).__name__}: the episode has ended after {self.steps} steps; reset first")

    def _came(self, seen: np.ndarray, reward: float, done: bool) -> Step:
        if not np.isfinite(reward):
            raise RunError(f"{type(self.scene).__name__}: the reward of step {self.steps} is {reward}")
        self.steps += 1
        self.cut = not done and self.steps >= self.max_steps
        self._over = done or self.cut
        return self._seen(seen), float(reward), self._over

    def _seen(self, seen: Any) -> np.ndarray:
        seen = np.asarray(seen, np.float32)
        if seen.shape != (self.scene.size,):
            raise RunError(f"{type(self.scene).__name__}: an observation has the shape {seen.shape}; it declares "
                           f"({self.scene.size},)")
        return seen

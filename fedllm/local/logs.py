"""Logs of acting, and what a decision transformer reads of them: windows, each behind a prompt of its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.core.errors import RecipeError
from fedllm.environments.env import Bounded, Scene
from fedllm.local.policy import Episode
from fedllm.tasks.row import IGNORE, Encoded

RANDOM = "random"
"""The habit that every environment has."""
Habit = Callable[[np.ndarray, np.random.Generator], int]


def habit(scene: Scene, name: str) -> Habit:
    """What is seen, and chance -> an action; RecipeError for a habit that the environment does not have."""
    if name == RANDOM:
        return lambda seen, rng: int(rng.integers(scene.actions))
    if name not in scene.habits:
        raise RecipeError(f"{type(scene).__name__} has no habit {name!r}; allowed are "
                          f"{', '.join((RANDOM, *scene.habits))}")
    return lambda seen, rng: scene.habits[name](seen)


def lived(env: Bounded, seed: int, act: Habit, rng: np.random.Generator) -> Episode:
    """One episode by a habit."""
    seen, over, trace = env.reset(seed), False, []
    while not over:
        action = act(seen, rng)
        to, reward, over = env.step(action)
        trace.append((seen, action, reward))
        seen = to
    saw, did, paid = zip(*trace, strict=True)
    return Episode(np.stack(saw), np.array(did), np.array(paid), env.cut)


def gathered(env: Bounded, episodes: int, rng: np.random.Generator, noise: float) -> list[Episode]:
    """Logs: each episode by one of the environment's habits, by chance, or by one action that was drawn for it; a share
    `noise` of steps is by chance in all of them."""
    ways = [*(habit(env.scene, name) for name in (RANDOM, *env.scene.habits)), None]
    out = []
    for _ in range(episodes):
        way, steady = ways[int(rng.integers(len(ways)))], int(rng.integers(env.scene.actions))

        def act(seen: np.ndarray, rng: np.random.Generator, way: Habit | None = way, steady: int = steady) -> int:
            if rng.random() < noise:
                return int(rng.integers(env.scene.actions))
            return way(seen, rng) if way else steady

        out.append(lived(env, int(rng.integers(2**31)), act, rng))
    return out


def to_go(episode: Episode, longest: int) -> np.ndarray:
    """Of each step what was still earned and the time, both by the longest episode's steps, fp32 [T, 2]."""
    left = episode.rewards[::-1].cumsum()[::-1] / longest
    return np.stack([left, np.arange(len(left)) / longest], 1).astype(np.float32)


@dataclass(frozen=True)
class Shown:
    """A prompt: cues of a place [C], steps of what went best there ([P, 2], [P, size], [P]), and what to ask for."""

    cues: np.ndarray
    togo: np.ndarray
    seen: np.ndarray
    did: np.ndarray
    target: float
    """The return that is asked for, by the longest episode's steps."""

    @property
    def tokens(self) -> int:
        """What stands in front of the steps."""
        return len(self.did) + bool(len(self.cues))

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """As the parts of a row."""
        return {"cues": self.cues, "shown_togo": self.togo, "shown_seen": self.seen, "shown_did": self.did}


class Pool:
    """The logs of one place: what a prompt is cut from, and windows that are learned from."""

    def __init__(self, logs: Sequence[Episode], env: Bounded, quantile: float, prompt: int) -> None:
        """`quantile` of the logged returns is what is asked for, and from where on episodes are shown; `prompt` steps
        of them, and with 0 neither prompt nor cues."""
        self.logs, self.prompt, self.longest = logs, prompt, env.max_steps
        self.cues = env.scene.cues() if prompt else np.zeros(0, np.float32)
        self.togo = [to_go(e, env.max_steps) for e in logs]
        total = np.array([e.total for e in logs])
        target = float(np.quantile(total, quantile))
        self.target, self.best = target / env.max_steps, np.flatnonzero(total >= min(target, total.max())).tolist()

    def shown(self, rng: np.random.Generator, but: int | None = None) -> Shown:
        """Steps in a row of one of the best episodes, other than the one numbered `but` where there is another."""
        pool = [i for i in self.best if i != but] or self.best
        i = pool[int(rng.integers(len(pool)))]
        best, n = self.logs[i], len(self.logs[i].actions)
        at = int(rng.integers(max(1, n - self.prompt + 1)))
        of = np.minimum(np.arange(at, at + self.prompt), n - 1)  # of a short episode the last step again
        return Shown(self.cues, self.togo[i][of], best.seen[of], best.actions[of].astype(np.int64), self.target)

    def windows(self, count: int, context: int, rng: np.random.Generator) -> list[Encoded]:
        """Rows of `context` steps in a row, each behind a prompt of another episode."""
        out = []
        for _ in range(count):
            i = int(rng.integers(len(self.logs)))
            e, front = self.logs[i], self.shown(rng, i)
            at = int(rng.integers(max(1, len(e.actions) - context + 1)))
            out.append(window(self.togo[i][at:], e.seen[at:], e.actions[at:], context, front))
        return out


def window(togo: np.ndarray, seen: np.ndarray, did: np.ndarray, context: int, front: Shown) -> Encoded:
    """The first `context` steps of these as a row; where there are fewer, zeros that are not learned fill it."""
    n = min(context, len(did))
    parts = {"togo": np.zeros((context, 2), np.float32), "seen": np.zeros((context, seen.shape[1]), np.float32),
             "did": np.full(context, IGNORE, np.int64)}
    parts["togo"][:n], parts["seen"][:n], parts["did"][:n] = togo[:n], seen[:n], did[:n]
    return Encoded(np.zeros(context + front.tokens, np.int32), 0, n, {**parts, **front.parts})

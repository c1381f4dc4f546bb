"""A walk from one corner of a grid to the other, with walls of its own for each layout, and a floor that may slip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import Scene, Step, layout

MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True)
class GridWorld(Scene):
    """`side` x `side` places; the observation says where one stands (one-hot). The goal gives 1, each step costs."""

    side: int = knob(5, "places along a side", ge=2, le=32)
    walls: int = knob(4, "places that cannot be entered", ge=0)
    slip: float = knob(0.0, "probability that a step goes anywhere", ge=0, lt=1)
    cost: float = knob(0.02, "what a step costs", ge=0)
    layout: int = layout
    actions = 4

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.side**2

    def env(self) -> Grid:
        return Grid(self)

    def blocked(self) -> frozenset[tuple[int, int]]:
        """The layout's walls, as many as leave a way to the goal."""
        rng, n = numpy_stream(self.layout, "walls"), self.side
        found: set[tuple[int, int]] = set()
        for i in rng.permutation(np.arange(1, n * n - 1)):
            if len(found) == self.walls:
                break
            place = (int(i) // n, int(i) % n)
            if _open(n, found | {place}):
                found.add(place)
        return frozenset(found)


def _open(n: int, walls: set[tuple[int, int]]) -> bool:
    """Whether the goal can be reached."""
    seen, todo = {(0, 0)}, [(0, 0)]
    while todo:
        y, x = todo.pop()
        for dy, dx in MOVES:
            to = (y + dy, x + dx)
            if to not in seen and to not in walls and 0 <= to[0] < n and 0 <= to[1] < n:
                seen.add(to)
                todo.append(to)
    return (n - 1, n - 1) in seen


class Grid:
    """The walk."""

    def __init__(self, scene: GridWorld) -> None:
        self.scene, self.walls = scene, scene.blocked()

    def reset(self, seed: int) -> np.ndarray:
        self.rng, self.at = np.random.default_rng(seed), (0, 0)
        return self._here()

    def step(self, action: int) -> Step:
        slips = self.scene.slip and self.rng.random() < self.scene.slip
        move = MOVES[int(self.rng.integers(4)) if slips else action]
        y, x = (min(max(a + m, 0), self.scene.side - 1) for a, m in zip(self.at, move, strict=True))
        if (y, x) not in self.walls:
            self.at = (y, x)
        home = self.at == (self.scene.side - 1,) * 2
        return self._here(), float(home) - self.scene.cost, home

    def _here(self) -> np.ndarray:
        seen = np.zeros(self.scene.size, np.float32)
        seen[self.at[0] * self.scene.side + self.at[1]] = 1
        return seen

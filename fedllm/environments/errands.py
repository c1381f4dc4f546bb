"""A text game: find a thing in a house, and bring it to whoever wants it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import layout
from fedllm.environments.rules import NONE
from fedllm.environments.words import WordScene, width

ROOMS = ("hall", "kitchen", "cellar", "study", "attic", "garden", "pantry", "workshop", "library")
THINGS = ("lamp", "rope", "book", "key")
WAYS = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
LINES = (*(f"go {w}" for w in WAYS), "take", "give")


@dataclass(frozen=True)
class Errands(WordScene):
    """`go north`, `go south`, `go west`, `go east`, `take`, `give`. All layouts run errands in the same `house`, each
    between `rooms` rooms of its own: what one learns of the way there is of use to all."""

    rooms: int = knob(4, "rooms of the nine between which a layout's errands go", ge=2, le=len(ROOMS))
    house: int = knob(0, "seed of which room lies where", ge=0)
    cost: float = knob(0.02, "what a line costs", ge=0)
    width: int = width
    layout: int = layout
    actions = len(LINES)

    def told(self, rules=NONE) -> House:
        return House(self)

    def plan(self) -> list[str]:
        """The rooms of the house, row by row, three in a row."""
        return [str(r) for r in numpy_stream(self.house, "house").permutation(ROOMS)]

    def known(self) -> list[str]:
        """The rooms of this layout's errands."""
        return [str(r) for r in numpy_stream(self.layout, "errands").permutation(ROOMS)[: self.rooms]]


class House:
    """The game."""

    def __init__(self, scene: Errands) -> None:
        self.scene, self.plan, self.known = scene, scene.plan(), scene.known()

    def reset(self, seed: int) -> str:
        rng = np.random.default_rng(seed)
        self.start, self.goal = (self.known[int(i)] for i in rng.choice(len(self.known), 2, replace=False))
        self.thing, self.carries = THINGS[int(rng.integers(len(THINGS)))], False
        self.at = self.plan.index(self.plan[int(rng.integers(9))])
        return self._told("You wake up.")

    def step(self, line: str) -> tuple[str, float, bool]:
        act, _, way = line.strip().lower().partition(" ")
        here = self.plan[self.at]
        if act == "go" and way in WAYS:
            y, x = self.at // 3 + WAYS[way][0], self.at % 3 + WAYS[way][1]
            if not (0 <= y < 3 and 0 <= x < 3):
                return self._told("There is a wall."), -self.scene.cost, False
            self.at = 3 * y + x
            return self._told("You go."), -self.scene.cost, False
        if act == "take" and here == self.start and not self.carries:
            self.carries = True
            return self._told(f"You take the {self.thing}."), 0.5 - self.scene.cost, False
        if act == "give" and here == self.goal and self.carries:
            return "Thank you!", 0.5 - self.scene.cost, True
        return self._told("Nothing happens."), -self.scene.cost, False

    def _told(self, first: str) -> str:
        lies = f"A {self.thing} lies here. " if self.plan[self.at] == self.start and not self.carries else ""
        holds = "it" if self.carries else "nothing"
        return (f"{first} This is the {self.plan[self.at]}. {lies}You carry {holds}. Bring the {self.thing} from the "
                f"{self.start} to the {self.goal}.")

    def commands(self) -> tuple[str, ...]:
        return LINES

    def admissible(self) -> list[bool]:
        return [True] * len(LINES)

    def facts(self) -> list[str]:
        """Where one is, and where one has to go next."""
        to = f"give in {self.goal}" if self.carries else f"take in {self.start}"
        return [f"{self.plan[self.at]}, {to}", f"{self.plan[self.at]}, {self.goal if self.carries else self.start}"]

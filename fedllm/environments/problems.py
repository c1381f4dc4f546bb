"""Questions that are answered by tools: what they are, and how a trace of calls is rewarded by what it found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.environments.toolbox import Called, Toolbox
from fedllm.environments.words import plain_words

Call = Callable[[Sequence[str]], str]
"""A numbered action: the line that it stands for, given what was found so far."""


@dataclass(frozen=True)
class Problem:
    """A question, the values that have to be found on the way to its answer, in order, and the calls to choose from."""

    text: str
    values: tuple[str, ...]
    answer: str
    calls: tuple[Call, ...]
    kind: str = ""


class Asked:
    """Episodes of one question each: a line is a tool and its argument, or `answer TEXT`, whose last word counts.

    Half of the reward is for what is found on the way, in equal parts and each once, half for the right answer; each
    line costs. The reward is a program's: what a tool's answer holds, and whether the last word is right.
    """

    keeps: Any
    """What must live as long as the episodes do."""

    def __init__(self, draw: Callable[[np.random.Generator], Problem], toolbox: Toolbox, cost: float) -> None:
        self.draw, self.toolbox, self.cost = draw, toolbox, cost
        self.keeps = None

    def reset(self, seed: int) -> str:
        self.problem, self.found, self.last = self.draw(np.random.default_rng(seed)), list[str](), "nothing"
        self.trace: list[tuple[str, Called]] = []
        self.toolbox.begin(seed)
        return self.problem.text

    def step(self, line: str) -> tuple[str, float, bool]:
        name, _, argument = line.strip().partition(" ")
        if name == "answer":
            right = ["", *argument.lower().split()][-1].rstrip(".!") == self.problem.answer.lower()
            return f"{argument.strip()[:80]!r} is {'right' if right else 'wrong'}.", 0.5 * right - self.cost, True
        got = self.toolbox.call(name, argument)
        self.trace.append((name, got))
        gain = 0.0
        if got.ok:
            self.last = got.text
            wanted = self.problem.values[len(self.found):][:1]
            if wanted and wanted[0] in re.findall(r"\w+", got.text):
                self.found.append(wanted[0])
                gain = 0.5 / len(self.problem.values)
        return f"{self.problem.text}\n{name}: {got.text}", gain - self.cost, False

    def commands(self) -> list[str]:
        """The problem's calls, and to answer with what the last call said."""
        return [*(call(self.found) for call in self.problem.calls), f"answer {self.last}"]

    def admissible(self) -> list[bool]:
        able = {"answer", *(t.name for t in self.toolbox.allowed)}
        return [line.partition(" ")[0] in able for line in self.commands()]

    def facts(self) -> list[str]:
        """The question's words beside how many values were found and what the last call was."""
        at = f"{len(self.found)} {self.trace[-1][0] if self.trace else ''}"
        return [f"{at} {w}" for w in plain_words(self.problem.text)]


def wordings(every: Sequence[Any], layout: int, own: int) -> list[Any]:
    """The `own` ways of putting a question that this layout knows, of all (0: all)."""
    return [every[(layout + i) % len(every)] for i in range(own)] if own else list(every)

"""Arithmetic with a calculator: a word problem of two numbers, in the words of each client's own part of the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.environments.env import layout
from fedllm.environments.problems import Asked, Problem, wordings
from fedllm.environments.reading import calculator
from fedllm.environments.rules import NONE
from fedllm.environments.words import WordScene, width

KINDS = {
    "+": ("Ann has {a} pears and gets {b} more, how many has she", "a bag of {a} and a bag of {b} make together",
          "add {b} to {a}", "what is the total of {a} and {b}"),
    "-": ("Ann has {a} pears and eats {b}, how many are left", "take {b} away from {a}",
          "by how much does {a} exceed {b}", "{b} of {a} coins were lost, how many remain"),
    "*": ("{a} boxes hold {b} each, how many is that", "{a} times {b}", "Ann walks {b} miles on each of {a} days",
          "{a} rows of {b} seats"),
    "/": ("{a} pears are shared out among {b}, what does each get", "divide {a} by {b}",
          "how often does {b} go into {a}", "split {a} into {b} equal parts"),
}
SIGNS = tuple(KINDS)


@dataclass(frozen=True)
class Sums(WordScene):
    """`calc EXPRESSION`, then `answer NUMBER`. By numbers: one of four operations on the two numbers, or the answer."""

    largest: int = knob(20, "largest number of a problem", ge=2, le=10**6)
    own: int = knob(2, "of the four ways of putting a question, those that a layout knows; 0: all", ge=0, le=4)
    cost: float = knob(0.02, "what a line costs", ge=0)
    width: int = width
    layout: int = layout
    actions, tools = len(SIGNS) + 1, True

    def told(self, rules=NONE) -> Asked:
        return Asked(self.problem, rules.box([calculator()], self, layout=self.layout), self.cost)

    def problem(self, rng: np.random.Generator) -> Problem:
        """One question; a quotient comes out even."""
        sign = SIGNS[int(rng.integers(4))]
        a, b = (int(n) for n in rng.integers(1, self.largest + 1, 2))
        a = a * b if sign == "/" else a
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        ways = wordings(KINDS[sign], self.layout, self.own)
        text = f"{ways[int(rng.integers(len(ways)))].format(a=a, b=b)}?"
        calls = tuple((lambda found, s=s: f"calc {a} {s} {b}") for s in SIGNS)
        # A minus sign is no part of a word: what is found is told by the number's digits.
        return Problem(text, (str(abs(value)),), str(value), calls, sign)

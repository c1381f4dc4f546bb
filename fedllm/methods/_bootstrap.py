"""New instructions out of a few: which demonstrations are shown, and what of what a model writes is worth keeping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.models.overlap import closest

Row = Mapping[str, Any]
UNDOABLE = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
            "go to")
"""What a language model cannot do."""


@dataclass(frozen=True)
class Filter:
    """Keeps what Self-Instruct keeps (Wang et al. 2023), in this order; `why` names the first that objects."""

    least_words: int = 4
    most_words: int = 150
    rouge_max: float = 0.7
    ascii_first: bool = True
    """Whether an instruction must begin with a letter of ASCII, which wipes out other scripts."""

    def why(self, row: Row, pool: Sequence[Row]) -> str | None:
        """Why this row is not taken into the pool; None: it is."""
        prompt, response = str(row.get("prompt", "")).strip(), str(row.get("response", "")).strip()
        return self.of_instruction(prompt, pool) or self.of_instance(prompt, response, pool)

    def of_instruction(self, prompt: str, pool: Sequence[Row]) -> str | None:
        """What is wrong with the instruction."""
        n = len(prompt.split())
        if not self.least_words <= n <= self.most_words:
            return "length"
        if any(re.search(rf"\b{word}\b", prompt, re.IGNORECASE) for word in UNDOABLE):
            return "undoable"
        if prompt.startswith("Write a program"):
            return "program"
        if not prompt[0].isalnum():
            return "punctuation"
        if self.ascii_first and not prompt[0].isascii():
            return "script"
        if self.rouge_max < 1 and closest(prompt, [r["prompt"] for r in pool], self.rouge_max) > self.rouge_max:
            return "near"
        return None

    def of_instance(self, prompt: str, response: str, pool: Sequence[Row]) -> str | None:
        """What is wrong with the answer."""
        if not response:
            return "empty"
        if response == prompt:
            return "echo"
        if response.endswith(":") or prompt.endswith(":"):
            return "colon"
        if any(r["prompt"].strip() == prompt and r["response"].strip() != response for r in pool):
            return "contradiction"
        return None


@dataclass(frozen=True)
class Frame:
    """How a demonstration is written, and read back: a mark, {prompt}, another mark, {response} and an end.

    Marks are compared without the white space around them, but an end that is white space alone (a blank line) is one.
    """

    template: str

    @property
    def marks(self) -> tuple[str, str, str]:
        """The three marks; ValueError where the template has not three."""
        marks = self.template.replace("{prompt}", "\0").replace("{response}", "\0").split("\0")
        if len(marks) != 3 or not all(m.strip() for m in marks[:2]) or "{response}{prompt}" in self.template:
            raise ValueError("it must be a mark, {prompt}, another mark, {response} and an end")
        return marks[0].strip(), marks[1].strip(), marks[2].strip() or marks[2]

    def shown(self, rows: Sequence[Row]) -> str:
        """These rows as demonstrations, and the beginning of the next."""
        return "".join(self.template.format(prompt=r["prompt"], response=r["response"]) for r in rows) + self.marks[0]

    def read(self, text: str) -> dict[str, str] | None:
        """Instruction and response in what a model went on with; None where it wrote none, or was cut off."""
        first, middle, end = self.marks
        prompt, found, rest = text.partition(middle)
        stop = end or first
        response, ended, _ = rest.partition(stop)
        row = {"prompt": prompt.strip(), "response": response.strip()}
        return row if found and ended and all(row.values()) else None


def picked(rng: np.random.Generator, seeds: Sequence[Row], machine: Sequence[Row], count: int, share: int
           ) -> list[Row]:
    """`count` demonstrations in a random order, at most `share` of them machine-made; of seeds what is lacking."""
    made = [machine[i] for i in rng.choice(len(machine), min(share, len(machine)), replace=False)] if machine else []
    own = [seeds[i] for i in rng.choice(len(seeds), min(count - len(made), len(seeds)), replace=False)]
    both = [*own, *made]
    return [both[i] for i in rng.permutation(len(both))]

"""Environments in words: an observation is a text, an action a line; by numbers they are like any other."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from fedllm.core.knobs import knob
from fedllm.environments.env import InWords, Scene, Step
from fedllm.environments.rules import NONE, Rules


class Words(Protocol):
    """One episode after another, in words."""

    def reset(self, seed: int) -> str:
        """What is told first."""
        ...

    def step(self, line: str) -> tuple[str, float, bool]:
        """What a line leads to: what is told, the reward, whether the episode has ended."""
        ...

    def commands(self) -> Sequence[str]:
        """The lines behind the numbered actions, as they stand now: as many as the scene's `actions`, all along."""
        ...

    def admissible(self) -> Sequence[bool]:
        """Which of them may be said at all: a tool that is off may not be called, however much is hoped of it."""
        ...

    def facts(self) -> Sequence[str]:
        """What a small policy sees: each falls into one of `width` entries of the observation."""
        ...


class WordScene(Scene):
    """A scene in words. By numbers it is an environment like any other: action i is the line `commands()[i]`."""

    tools: ClassVar[bool] = False
    """Whether its lines call tools, over which a site's rules stand."""
    width: int

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.width

    def told(self, rules: Rules = NONE) -> Words:
        """A fresh environment in words, whose tools these rules hold."""
        raise NotImplementedError

    def open(self, rules: Rules = NONE) -> Numbered:
        return Numbered(self, self.told(rules))

    def env(self) -> Numbered:
        return self.open()


width = knob(256, "entries of a small policy's observation; facts are hashed into them", ge=8, le=65536)
"""Every scene in words has this knob."""


class Numbered(InWords):
    """The same environment with numbers for lines, and vectors for texts."""

    def __init__(self, scene: WordScene, words: Words) -> None:
        self.scene, self.words, self.text = scene, words, ""

    def reset(self, seed: int) -> np.ndarray:
        self.text = self.words.reset(seed)
        return self.seen()

    def step(self, action: int) -> Step:
        return self.say(self.words.commands()[action])

    def say(self, line: str) -> Step:
        """An action in words."""
        self.text, reward, over = self.words.step(line)
        return self.seen(), reward, over

    def commands(self) -> Sequence[str]:
        return self.words.commands()

    def admissible(self) -> Sequence[bool]:
        return self.words.admissible()

    def seen(self) -> np.ndarray:
        """The facts, one entry each."""
        out = np.zeros(self.scene.size, np.float32)
        out[[zlib.crc32(f.encode()) % self.scene.size for f in self.words.facts()]] = 1
        return out


def plain_words(text: str) -> list[str]:
    """Lower-case words, all numbers alike."""
    return re.findall(r"[a-z#]+", re.sub(r"\d+", "#", text.lower()))

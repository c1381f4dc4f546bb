"""What tools answered, in a file: written as a run goes on, and read in the place of the tools by another."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError, RunError
from fedllm.environments.toolbox import Called, Told, Tool, Toolbox

Key = tuple[str, int, int, str, str]
"""Environment, seed of the episode, place in it, tool, argument."""


def tape(path: Path) -> Tape:
    """The one tape of this process at a path."""
    return _tape(os.getpid(), path.resolve())


@functools.lru_cache(maxsize=64)
def _tape(pid: int, path: Path) -> Tape:
    return Tape(path)


class Tape:
    """JSON lines: the tools of each environment, and every call with its answer.

    An answer is found by environment, seed and place; where an episode is played again (tests play the same ones), the
    answers come in the order in which they were given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: dict[str, list[Tool]] = {}
        self.answers: dict[Key, list[Called]] = defaultdict(list)
        self.asked: Counter[Key] = Counter()
        self.known: set[str] = set()

    # -- writing -------------------------------------------------------------------------------------------------------

    def writer(self, who: str, tools: Sequence[Tool]) -> Callable[[int, int, str, str, Called], None]:
        """What writes an environment's calls; its tools are written first, once."""
        if who not in self.known:
            self.known.add(who)
            self._write({"who": who, "tools": [[t.name, t.about, list(t.does)] for t in tools]})

        def write(seed: int, at: int, tool: str, argument: str, said: Called) -> None:
            self._write({"who": who, "seed": seed, "at": at, "tool": tool, "argument": argument, "text": said.text,
                         "ok": said.ok})

        return write

    def _write(self, line: dict[str, Any]) -> None:
        """One line in one write, so that several processes may share a tape; it is its owner's alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, json.dumps(line).encode() + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            raise RunError(f"data.environment.record = '{self.path}' cannot be written ({error.strerror})") from None

    # -- reading -------------------------------------------------------------------------------------------------------

    def of(self, who: str) -> Player:
        """What answers for an environment; RunError where the tape has none of it."""
        if not self.told:
            self._read()
        if who not in self.told:
            raise RunError(f"data.environment.replay = '{self.path}' has nothing of this environment: it is another "
                           "run's, or the recipe is another")
        return Player(self, who)

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"data.environment.replay = '{self.path}' cannot be read ({error})") from None
        for i, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                if "tools" in line:
                    self.told[line["who"]] = [Tool(n, a, str, tuple(d), True) for n, a, d in line["tools"]]
                else:
                    key = (line["who"], line["seed"], line["at"], line["tool"], line["argument"])
                    self.answers[key].append(Called(str(line["text"]), bool(line["ok"])))
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(f"data.environment.replay = '{self.path}', line {i} is no line of a tape "
                                  f"({type(error).__name__})") from None


class Player:
    """Tools that say what the tape has."""

    box: Toolbox
    """Whose calls they are: it knows the episode and the place in it."""

    def __init__(self, tape: Tape, who: str) -> None:
        self.tape, self.who = tape, who

    @property
    def tools(self) -> list[Tool]:
        """The tools as the tape knows them."""
        return [Tool(t.name, t.about, functools.partial(self._say, t.name), t.does, ends=True)
                for t in self.tape.told[self.who]]

    def _say(self, tool: str, argument: str) -> str:
        key = (self.who, self.box.seed, self.box.made, tool, argument)
        found = self.tape.answers.get(key)
        if not found:
            raise RunError(f"data.environment.replay = '{self.tape.path}' has no answer of {tool!r} to "
                           f"{argument[:80]!r} at this place: the run took another way than the one that was recorded")
        said = found[min(self.tape.asked[key], len(found) - 1)]
        self.tape.asked[key] += 1
        if not said.ok:
            raise Told(said.text.removeprefix(f"tool '{tool}' failed: "))
        return said.text

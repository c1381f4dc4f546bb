"""Tools that an agent may call: each says what it does beside reading, and no call outlasts its seconds."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import RecipeError, RunError

EFFECTS = ("write", "network")
"""What a tool may do beside reading what is here; each is off unless the site's policy names it."""
LONGEST = 2000
"""Characters of an answer; what is beyond them is cut off."""
PATIENCE = 2.0
"""Seconds that a call may take."""


@dataclass(frozen=True)
class Tool:
    """`run(argument)` answers with text, or raises."""

    name: str
    about: str
    run: Callable[[str], str]
    does: tuple[str, ...] = ()
    """Of `EFFECTS`."""
    ends: bool = False
    """It bounds its own time (by `seconds`, `limited` or its input), so that it may run in this very process; any other
    tool runs in one of its own, which is killed. Such a tool cannot change anything in this process."""

    def __post_init__(self) -> None:
        if odd := set(self.does) - set(EFFECTS):
            raise RecipeError(f"tool '{self.name}' does {sorted(odd)}; allowed are {', '.join(EFFECTS)}")


class Told(Exception):
    """A tool's own word on why it failed, which an agent reads as it stands."""


@dataclass(frozen=True)
class Called:
    """What came of a call; where it is not `ok`, `text` says why in one sentence."""

    text: str
    ok: bool = True


def checked_policy(may: Sequence[str], path: str = "data.environment.may") -> tuple[str, ...]:
    """What tools may do, in the order of `EFFECTS`; RecipeError for anything else."""
    if isinstance(may, str) or (odd := [m for m in may if m not in EFFECTS]):
        raise RecipeError(f"{path} = {may if isinstance(may, str) else odd}: allowed is a list of "
                          f"{', '.join(EFFECTS)}; [] lets tools read alone")
    return tuple(e for e in EFFECTS if e in may)


class Toolbox:
    """The tools of one agent under one site's policy. A call never raises for what a tool does: an agent reads why it
    failed, and goes on."""

    def __init__(self, tools: Sequence[Tool], may: Sequence[str] = (), seconds: float = PATIENCE,
                 longest: int = LONGEST, calls: int | None = None, characters: int | None = None,
                 heard: Callable[[int, int, str, str, Called], None] = lambda *_: None) -> None:
        """`may`: what tools may do beside reading; `calls` and `characters` of all answers are budgets of an episode;
        `heard` is told every call: seed, place in the episode, tool, argument, answer. RecipeError for a policy that
        names no effect."""
        self.tools: Mapping[str, Tool] = {t.name: t for t in tools}
        self.may, self.seconds, self.longest = checked_policy(may), seconds, longest
        self.calls, self.characters, self.heard = calls, characters, heard
        self.begin(0)

    def begin(self, seed: int) -> None:
        """An episode begins, with budgets of its own."""
        self.seed, self.made, self.read = seed, 0, 0

    @property
    def allowed(self) -> list[Tool]:
        """The tools that the policy lets pass."""
        return [t for t in self.tools.values() if not set(t.does) - set(self.may)]

    def call(self, name: str, argument: str) -> Called:
        """The tool's answer, within `seconds` and `longest` characters."""
        tool = self.tools.get(name)
        if tool is None:
            return Called(f"there is no tool '{name[:40]}'; there are {', '.join(t.name for t in self.allowed)}", False)
        if off := [e for e in tool.does if e not in self.may]:
            return Called(f"tool '{name}' is off: it may {' and '.join(off)}, which this site does not allow", False)
        if self.calls is not None and self.made >= self.calls:
            return Called(f"tool '{name}' is not called: the {self.calls} calls of this episode are made", False)
        if self.characters is not None and self.read >= self.characters:
            return Called(f"tool '{name}' is not called: the {self.characters} characters of answers of this episode "
                          "are read", False)
        said = self._called(tool, argument)
        self.heard(self.seed, self.made, name, argument, said)
        self.made, self.read = self.made + 1, self.read + len(said.text)
        return said

    def _called(self, tool: Tool, argument: str) -> Called:
        got = answer(tool.run, argument) if tool.ends else apart(tool.run, argument, self.seconds)
        if got is None:
            got = f"it did not end within {self.seconds:g} s", False
        text, ok = got
        left = self.longest if self.characters is None else min(self.longest, self.characters - self.read)
        return Called((text if ok else f"tool '{tool.name}' failed: {text[:200]}")[:left], ok)


def answer(run: Callable[[str], str], argument: str) -> tuple[str, bool]:
    """What the tool says, and whether it did not fail."""
    try:
        return str(run(argument)), True
    except Told as error:
        return str(error), False
    except RunError:  # the environment breaks its word: that is no answer, and the run ends
        raise
    except Exception as error:  # whatever a tool raises is its answer
        return f"{type(error).__name__}: {error}", False


def apart(run: Callable[[str], str], argument: str, seconds: float) -> tuple[str, bool] | None:
    """What the tool says in a process of its own; None where it had not ended by then, and was killed."""
    try:
        how: Any = multiprocessing.get_context("fork")
    except ValueError:
        return "this system has no way to run it in a process of its own", False
    here, there = how.Pipe(duplex=False)
    child = how.Process(target=_tell, args=(there, run, argument), daemon=True)
    try:
        child.start()
    except (AssertionError, OSError) as error:  # a worker that may have no children, or no process is left
        return f"it cannot be run in a process of its own here ({error})", False
    there.close()
    try:
        if not here.poll(seconds):
            return None
        text, ok = json.loads(here.recv_bytes(1 << 22))
        return str(text), bool(ok)
    except EOFError:
        return "it ended without an answer", False
    except (OSError, ValueError) as error:
        return f"its answer cannot be read ({type(error).__name__})", False
    finally:
        child.kill()
        child.join(5)
        here.close()


def _tell(pipe: Any, run: Callable[[str], str], argument: str) -> None:
    with contextlib.suppress(OSError):
        text, ok = answer(run, argument)
        pipe.send_bytes(json.dumps([text[: 1 << 20], ok]).encode())

"""What a site allows the tools of its environment: what they may do, where they come from, and how much of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.environments.served import BUILTIN, server_of
from fedllm.environments.tape import tape
from fedllm.environments.toolbox import PATIENCE, Tool, Toolbox, checked_policy

AT = "data.environment"


@dataclass(frozen=True)
class Rules:
    """One site's rules for tools. They stand in the client's own row, which no server writes."""

    may: tuple[str, ...] = ()
    """Of `toolbox.EFFECTS`: what tools may do beside reading."""
    mcp: tuple[str, ...] = ()
    """The command of an MCP server whose tools are used in the place of this process's own; ("builtin",): ours."""
    seconds: float = PATIENCE
    """That a call may take."""
    calls: int | None = None
    """Of an episode, at most."""
    characters: int | None = None
    """Of all answers of an episode, at most."""
    record: str | None = None
    """A file that every call and its answer are written to."""
    replay: str | None = None
    """A file so written, which answers in the place of the tools."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the rules."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Rules:
        """Rules from a recipe's or a row's values; RecipeError names what is not allowed."""
        given = {k: v for k, v in values.items() if v is not None}
        rules = cls(**{**given, "may": checked_policy(given.get("may", ()), f"{AT}.may"),
                       "mcp": command(given.get("mcp", ()))})
        if not (0 < rules.seconds <= 600):
            raise RecipeError(f"{AT}.seconds = {rules.seconds}: allowed is a number above 0, up to 600")
        for key in ("calls", "characters"):
            most = getattr(rules, key)
            if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
                raise RecipeError(f"{AT}.{key} = {most!r}: allowed is a whole number from 1")
        if rules.replay is not None and (rules.record is not None or rules.mcp):
            raise RecipeError(f"{AT}.replay = {rules.replay!r} answers in the place of all tools; leave out record and "
                              "mcp")
        return rules

    def told(self) -> dict[str, Any]:
        """What of them is not the default, as a row has it."""
        odd = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in odd.items()}

    def box(self, own: Sequence[Tool], scene: Any, **places: Any) -> Toolbox:
        """The tools of one environment: its `own`, an MCP server's, or a tape's. `places` (db, files, layout) are
        filled into a command as {db}, and into a server's tools where their schema asks for them."""
        if self.replay is not None:
            who = tape(Path(self.replay)).of(who_is(scene))
            box = Toolbox(who.tools, self.may, self.seconds, calls=self.calls, characters=self.characters)
            who.box = box
            return box
        tools: Sequence[Tool] = own
        if self.mcp:
            words = tuple(_filled(w, places) for w in self.mcp)
            only = [t.name for t in own] if self.mcp == BUILTIN else None
            tools = server_of(words, self.seconds).tools(places, only)
        heard = {} if self.record is None else {"heard": tape(Path(self.record)).writer(who_is(scene), tools)}
        return Toolbox(tools, self.may, self.seconds, calls=self.calls, characters=self.characters, **heard)


NONE = Rules()


def command(words: Any, path: str = f"{AT}.mcp") -> tuple[str, ...]:
    """A server's command as a list of words, or `builtin`; RecipeError for anything else: no shell reads it."""
    if words == BUILTIN[0]:
        return BUILTIN
    fits = isinstance(words, Sequence) and not isinstance(words, str) and len(words) <= 64
    if not fits or not all(isinstance(w, str) and w and "\0" not in w for w in words):
        raise RecipeError(f"{path} = {words!r:.200}: allowed is '{BUILTIN[0]}', or a server's command as a list of "
                          "words, as in [python, /srv/tools.py]")
    return tuple(words)


def who_is(scene: Any) -> str:
    """What a tape knows an environment by."""
    return hashlib.sha256(repr(scene).encode()).hexdigest()[:16]


def _filled(word: str, places: Mapping[str, Any]) -> str:
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word



"""Verdicts: for every piece of text in a reply what was found and done, bound to it by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload

KEY = "_gate"
"""Where a reply's verdicts stand in it."""
DONE = ("pass", "report", "redact", "blank", "withhold")
"""What may be done with a text, from nothing to sending no reply at all."""
STRICT = {"off": -1, **{name: i for i, name in enumerate(DONE)}}


@dataclass(frozen=True)
class Verdict:
    """What the gate did with one text."""

    key: str
    at: int
    """The number of the text among those of its key."""
    sha: str
    """The first 16 digits of the sha256 of what leaves."""
    done: str
    rules: tuple[str, ...] = ()
    """By which rules: `copy:rouge`, `personal:EMAIL`, `license:unknown`."""

    def listed(self) -> list[Any]:
        """As it crosses the wire and stands in the record."""
        return [self.key, self.at, self.sha, self.done, list(self.rules)]

    @classmethod
    def of(cls, told: Any) -> Verdict:
        """Read one; PayloadError where it is none."""
        try:
            key, at, sha, done, rules = told
            if done not in DONE or not isinstance(at, int) or not all(isinstance(r, str) for r in (key, sha, *rules)):
                raise ValueError
        except (ValueError, TypeError):
            raise PayloadError(f"{str(told)[:80]} is no verdict") from None
        return cls(key, at, sha, done, tuple(rules))


def sha(text: str) -> str:
    """What binds a verdict to its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spoken(reply: Payload) -> Iterator[tuple[str, int, str]]:
    """Every text of a reply: its key, its number there, and what it says; what is empty says nothing."""
    for key in sorted(reply):
        if key != KEY:
            yield from ((key, i, t) for i, t in enumerate(_leaves(reply[key])) if t)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)


def told(reply: Payload, change: Callable[[str, int, str], str]) -> dict[str, Any]:
    """The reply with every text changed: `change` is told its key, its number there, and what it says."""
    out: dict[str, Any] = {}
    for key in sorted(reply):
        count = iter(range(1 << 60))

        def new(value: Any, key: str = key, count: Iterator[int] = count) -> Any:
            if isinstance(value, str):
                at = next(count)
                return change(key, at, value) if value else value
            return [new(v) for v in value] if isinstance(value, list | tuple) else value

        out[key] = new(reply[key])
    return {key: out[key] for key in reply}


def written(verdicts: list[Verdict], demands: Mapping[str, str]) -> str:
    """All verdicts of a reply, and what was demanded."""
    return json.dumps({"demands": dict(demands), "items": [v.listed() for v in verdicts]}, separators=(",", ":"))


def judged(reply: Payload) -> tuple[list[Verdict], dict[str, str]]:
    """The verdicts of a reply and what its gate demanded; PayloadError for any text in it that has none.

    A reply without text needs no verdict.
    """
    texts = list(spoken(reply))
    if KEY not in reply:
        if texts:
            raise PayloadError(f"'{texts[0][0][:80]}' is text without a verdict of the gate")
        return [], {}
    try:
        said = json.loads(reply[KEY])
        verdicts, demands = [Verdict.of(v) for v in said["items"]], {str(k): str(v) for k, v in said["demands"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PayloadError(f"'{KEY}' holds no verdicts") from None
    by = {(v.key, v.at): v for v in verdicts}
    for key, at, text in texts:
        mine = by.get((key, at))
        if mine is None or mine.sha != sha(text) or mine.done in ("blank", "withhold"):
            raise PayloadError(f"text {at} of '{key[:80]}' is not the one that the gate's verdict is about")
    return verdicts, demands

"""What a reply may hold when no text may leave: tensors, numbers, and the words of the protocol itself.

Layers send more than numbers: names of peers, layouts of what is masked, keys and sealed letters. None of that is text
of rows. So words are let out when they are known beforehand: the run's sites, types of tensors, what the coordinator
said itself, and names that are made of the names of the model's own tensors and of the method's own reply.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import fedllm.core
from fedllm.core.form import MARK
from fedllm.core.payload import Payload
from fedllm.wire.codec import NAMES

LONGEST = 512
"""Characters of the longest key."""
PIECE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}|\d{1,9}|")
"""A piece of a key: an identifier, a number, or nothing (keys of layers begin with `_`, `-` or `/`)."""
OWN_WORDS = frozenset({*NAMES.values(), "none", "poisson", "fixed", "product"})


@dataclass(frozen=True)
class Words:
    """What a reply may say in words."""

    whole: frozenset[str] = frozenset()
    pieces: frozenset[str] = frozenset()
    """Of which names in layouts are made."""
    keys: frozenset[str] = frozenset()
    """Of which keys may be made too."""

    @classmethod
    def of(cls, whole: Iterable[str], names: Iterable[str]) -> Words:
        """These words, and all names that are made of the pieces of these names."""
        return cls(OWN_WORDS | frozenset(whole), frozenset(p for n in names for p in re.split(r"[./]", n)))

    def more(self, whole: Iterable[str], names: Iterable[str]) -> Words:
        """These words and those."""
        return Words(self.whole | frozenset(whole), self.pieces | Words.of((), names).pieces, self.keys)

    def content(self) -> Words:
        """For what a method says itself: keys as ever, and no word of the protocol."""
        return Words(keys=self.keys | self.pieces)

    def know(self, text: str) -> bool:
        """Whether this text is one of the words, a name, or a layout (JSON) of such."""
        if text in self.whole or MARK.fullmatch(text):  # a digest says what something is, and not what it says
            return True
        if text[:1] == "[" and not self.unknown_in(_json(text)):
            return True
        parts = re.split(r"[./]", text)
        known = [p for p in parts if p in self.pieces or p in OWN_WORDS]
        return any(known) and all(p in known or p.isdecimal() for p in parts)

    def name(self, key: Any) -> bool:
        """Whether a key is made of names that stand in the installed code or in the model, and of numbers."""
        if key in self.whole:
            return True
        if not well_named(key):
            return False
        parts = [p for p in re.split(r"[./-]", key) if p]
        own, code = self.pieces | self.keys, code_names()
        known = [p for p in parts if p in own or p in code or p.rstrip("0123456789").rstrip("_") in code]
        return any(known) and all(p in known or p.isdecimal() for p in parts)

    def unknown_in(self, value: Any) -> bool:
        """Whether a value holds, at any depth, text that is none of these words, or a mapping."""
        return any(isinstance(v, Mapping) or (isinstance(v, str) and not self.know(v)) for v in flat(value))


@functools.cache
def code_names() -> frozenset[str]:
    """Every identifier in fedllm's own code: what keys of replies are made of. Made-up people are none."""
    files = (p for p in Path(fedllm.core.__file__).parents[1].rglob("*.py") if not p.name.startswith("office"))
    return frozenset(name for p in files for name in re.findall(r"[A-Za-z_]\w*", p.read_text(encoding="utf-8")))


def flat(value: Any) -> Iterator[Any]:
    """Every leaf of nested lists."""
    if isinstance(value, list | tuple | set | frozenset):
        for v in value:
            yield from flat(v)
    else:
        yield value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def texts(payload: Payload) -> Iterator[str]:
    """All that a payload says in words."""
    return (v for value in payload.values() for v in flat(value) if isinstance(v, str))


def held_back(payload: Payload, words: Words = Words(OWN_WORDS), sealed: bool = False, tells: Iterable[str] = ()
              ) -> str | None:
    """Why a payload holds more than tensors, numbers and these words; None when it does not. `sealed`: bytes may
    leave too (keys and letters); `tells` are keys under which a layer tells of the machine."""
    for key, value in payload.items():
        if not words.name(key):
            return f"the key {str(key)[:60]!r} is no name of the code or the model"
        if isinstance(value, Tensor | int | float | None):
            continue
        if key in tells and isinstance(value, str) and len(value) <= LONGEST:
            continue
        if not sealed and any(isinstance(v, bytes | bytearray | memoryview) for v in flat(value)):
            return f"'{key}' holds bytes"
        if words.unknown_in(value):
            return f"'{key}' is text"
        if not all(isinstance(v, str | bytes | bytearray | int | float | None) for v in flat(value)):
            return f"'{key}' is no tensor, number or list"
    return None


def well_named(key: Any) -> bool:
    """Whether a key is a name as code has them, and not a sentence."""
    return isinstance(key, str) and len(key) <= LONGEST and all(PIECE.fullmatch(p) for p in re.split(r"[./]", key))

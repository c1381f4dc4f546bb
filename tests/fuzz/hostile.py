"""What strangers write into recipes, files and folders: values, and documents of which a part was changed."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "x", "a" * 100_000, "\0", "\ud800", "../../etc/passwd", "/dev/zero", "NaN",
    "1e5", "[/red]\x1b[31m<script>", "{prompt}", "{0.__class__}", "%s%n", [], [None], [True], ["a", 1], [[]], [1, 2, 3],
    [math.inf], [-1], [[[1]]], ["x"] * 3, {}, {"a": 1}, {"": None}, {1: 2}, {None: None}, {True: []}, {"name": "lora"},
    {"name": None}, {"a": {"name": "x"}}, {"x": math.nan})
"""Values, of which none is a good one everywhere."""


def tries(usual: int) -> int:
    """How many inputs a test makes: `FEDLLM_FUZZ` of them (`make fuzz`), or as many as CI has time for."""
    return int(os.environ.get("FEDLLM_FUZZ", usual))


def places(doc: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a document."""
    items = doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def value_at(doc: Any, path: tuple[Any, ...]) -> Any:
    """What lies there."""
    for key in path:
        doc = doc[key]
    return doc


def bent(rnd: random.Random, value: Any) -> Any:
    """Something else in the place of a value: anything odd, or much like it."""
    if rnd.random() < 0.3:
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, int | float):
            return rnd.choice([-value, value * 10**9, str(value), [value], float(value), bool(value)])
        if isinstance(value, str):
            return rnd.choice([value + "\n", value.upper(), [value], {"name": value}, value * 500])
        if isinstance(value, list):
            return rnd.choice([value * 2, value[:-1], [value], dict(enumerate(value)), [*value, rnd.choice(ODD)]])
        if isinstance(value, dict):
            return rnd.choice([[value], list(value), {**value, rnd.choice(["", "x", "name", 7]): rnd.choice(ODD)}])
    return copy.deepcopy(rnd.choice(ODD))


def changed(rnd: random.Random, doc: Any, most: int = 2) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
    """The document with a few things in it changed, and which."""
    doc, did = copy.deepcopy(doc), []
    for _ in range(rnd.randint(1, most)):
        path = rnd.choice(list(places(doc)) or [()])
        if not path:
            return bent(rnd, doc), [((), None)]
        inside = value_at(doc, path[:-1])
        if rnd.random() < 0.1:
            del inside[path[-1]]
        else:
            inside[path[-1]] = bent(rnd, inside[path[-1]])
            did.append((path, inside[path[-1]]))
    return doc, did


def garbled(rnd: random.Random, data: bytes) -> bytes:
    """The bytes with some of them lost, doubled, moved, or replaced."""
    out = bytearray(data)
    for _ in range(rnd.randint(1, 4)):
        a = rnd.randrange(len(out) + 1)
        b = min(len(out), a + rnd.choice((1, 1, 2, 8, 64)))
        way = rnd.randrange(6)
        if way == 0:
            del out[a:b]
        elif way == 1:
            out[a:a] = out[a:b] * rnd.choice((1, 3))
        elif way == 2:
            out[a:b] = bytes(rnd.randrange(256) for _ in range(b - a))
        elif way == 3:
            out[a:a] = rnd.choice((b"\0", b"\xff", b'"', b"{", b"[", b"}", b"\n", b",", b": ", b"- ", b"&a ", b"*a",
                                   b"1e999", b"NaN", b"\xed\xa0\x80", b"!!python/name:os.system ", b"9" * 5000,
                                   b"0x" + b"f" * 5000, b"[" * 300))
        elif way == 4:
            del out[a:]
        else:
            out[a:a] = out
    return bytes(out[: 1 << 18])


def unfit(value: Any) -> bool:
    """Whether a value holds a number that is none."""
    if isinstance(value, dict):
        return any(map(unfit, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(unfit, value))
    return isinstance(value, float) and not math.isfinite(value)

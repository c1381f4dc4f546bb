"""What strangers write into recipes, files and folders, as strategies of hypothesis: values, documents of which a part
was changed, and bytes that were garbled. Drawn are the changes and not the outcome: a failure shows what was done.

In CI the same inputs come each time (tests/conftest.py); `FEDLLM_FUZZ` makes so many new ones for each test.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fedllm.core.errors import FedLLMError

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "x", "a" * 100_000, "\0", "\ud800", "../../etc/passwd", "/dev/zero", "NaN",
    "1e5", "[/red]\x1b[31m<script>", "{prompt}", "{0.__class__}", "%s%n", [], [None], [True], ["a", 1], [[]], [1, 2, 3],
    [math.inf], [-1], [[[1]]], ["x"] * 3, {}, {"a": 1}, {"": None}, {1: 2}, {None: None}, {True: []}, {"name": "lora"},
    {"name": None}, {"a": {"name": "x"}}, {"x": math.nan})
"""Values, of which none is a good one everywhere."""

SECONDS = 60.0
"""Longest that one input may take to be refused or taken, on a slow and busy machine."""

LEAVES = st.none() | st.booleans() | st.integers() | st.floats()
TEXT = st.text("aZ0_ -.:,/{}[]'\"\n\t\0\x1b\xe9\u6f22\u202e\U0001f600\ud800", max_size=5)
ANYTHING: SearchStrategy[Any] = st.sampled_from(ODD).map(copy.deepcopy) | LEAVES | TEXT | st.recursive(
    LEAVES | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=4)
"""Any value at all; half of them odd."""


def fuzzed(usual: int) -> Any:
    """How many inputs a test takes: `FEDLLM_FUZZ` (`make fuzz`), or as many as CI has time for."""
    return settings(max_examples=int(os.environ.get("FEDLLM_FUZZ", usual)))


class Lost:
    """In the place of a value: its key is gone."""

    def __repr__(self) -> str:
        return "LOST"


LOST = Lost()
Path = tuple[Any, ...]


class Change(NamedTuple):
    """What a document holds at a path, in the place of what was there."""

    path: Path
    value: Any


def places(doc: Any, at: Path = ()) -> Iterator[Path]:
    """The paths of all values inside a document."""
    items = doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def value_at(doc: Any, path: Path) -> Any:
    """What lies there."""
    for key in path:
        doc = doc[key]
    return doc


def near(value: Any) -> SearchStrategy[Any]:
    """A value much like this one, and not quite."""
    if isinstance(value, bool):
        return st.just(int(value))
    if isinstance(value, int | float):
        return st.sampled_from([-value, value * 10**9, str(value), [value], float(value), bool(value)])
    if isinstance(value, str):
        return st.sampled_from([value + "\n", value.upper(), [value], {"name": value}, value * 500])
    if isinstance(value, list):
        made = [value * 2, value[:-1], [value], dict(enumerate(value))]
        return st.sampled_from(made).map(copy.deepcopy) | ANYTHING.map(lambda x: [*copy.deepcopy(value), x])
    if isinstance(value, dict):
        more = st.tuples(st.sampled_from(["", "x", "name", 7]) | TEXT, ANYTHING)
        return (st.sampled_from([[value], list(value)]).map(copy.deepcopy)
                | more.map(lambda pair: {**copy.deepcopy(value), pair[0]: pair[1]}))
    return ANYTHING


def bent(value: Any) -> SearchStrategy[Any]:
    """Something else in the place of a value: anything odd, or much like it."""
    return ANYTHING | near(value)


def changes(doc: Any, most: int = 2) -> SearchStrategy[list[Change]]:
    """A few things that become of a document."""
    known = list(places(doc)) or [()]
    one = st.sampled_from(known).flatmap(lambda path: st.builds(
        Change, st.just(path), bent(value_at(doc, path)) | (st.just(LOST) if path else st.nothing())))
    return st.lists(one, min_size=1, max_size=most)


def changed(doc: Any, made: Sequence[Change]) -> tuple[Any, list[Change]]:
    """The document after these changes, and those that found their place and left something there."""
    doc, did = copy.deepcopy(doc), []
    for change in made:
        if not change.path:
            return change.value, []
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier one took its place away
            inside = value_at(doc, change.path[:-1])
            if isinstance(change.value, Lost):
                del inside[change.path[-1]]
            elif isinstance(inside, dict | list):
                inside[change.path[-1]] = change.value
                did.append(change)
    return doc, did


SCRAPS = (b"\0", b"\xff", b'"', b"{", b"[", b"}", b"\n", b",", b": ", b"- ", b"&a ", b"*a", b"1e999", b"NaN",
          b"\xed\xa0\x80", b"!!python/name:os.system ", b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 300)


class Slip(NamedTuple):
    """What happens to some bytes: the `length` of them `at` a place go, and `instead` comes so many `times`."""

    at: int
    length: int
    instead: bytes | None
    """None: they themselves."""
    times: int


def slips(data: bytes) -> SearchStrategy[list[Slip]]:
    """What becomes of bytes: some are lost, doubled, replaced, or all after them are cut off."""
    at = st.integers(0, len(data))
    length = st.sampled_from([0, 1, 1, 2, 8, 64, len(data)])
    instead = st.sampled_from([b"", None, *SCRAPS]) | st.binary(max_size=8)
    return st.lists(st.builds(Slip, at, length, instead, st.sampled_from([1, 2, 4])), min_size=1, max_size=4)


def garbled(data: bytes, made: Sequence[Slip]) -> bytes:
    """The bytes after these slips, a quarter of a million at the most."""
    for at, length, instead, times in made:
        at = min(at, len(data))
        taken = data[at : at + length]
        data = data[:at] + (taken if instead is None else instead) * times + data[at + length :]
    return data[: 1 << 18]


class _Hangs(BaseException):
    """No `except Exception` of what is tried stops it."""


@contextlib.contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """AssertionError for what takes longer, while it still does; pytest's own clock goes on around it."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hangs

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Hangs:
        raise AssertionError(f"no end within {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)))


def met(work: Callable[[], Any], kind: type[FedLLMError] = FedLLMError, longest: int = FedLLMError.LONGEST) -> Any:
    """The result of some work, or its refusal, an error of this kind that is no longer; anything else is a fault, and
    so is a long wait."""
    with within():
        try:
            return work()
        except kind as error:
            assert len(str(error)) <= longest, f"a sentence of {len(str(error))} characters: {str(error)[:200]}"
            return error


def unfit(value: Any) -> bool:
    """Whether a value holds a number that is none."""
    if isinstance(value, dict):
        return any(map(unfit, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(unfit, value))
    return isinstance(value, float) and not math.isfinite(value)

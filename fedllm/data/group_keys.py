"""Pure functions of one row that say which group it belongs to.

Randomness is keyed by the seed and by the row's place, (file, line), so that neither workers nor their order move it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedllm.core.errors import DataError, FedLLMError, RecipeError
from fedllm.core.rng import numpy_stream, seed_of
from fedllm.data.sources import nearest, value_of
from fedllm.tasks.row import names_in

KeyFunction = Callable[[Mapping[str, Any]], Any]
"""A row -> its key: text, bytes (UTF-8) or a whole number."""
Placed = Callable[[Mapping[str, Any], tuple[int, int], str], str]
"""(row, its place, how an error names it) -> the group's id."""
KINDS = ("column", "host", "random", "dirichlet", "call")


def key_function(key: str | KeyFunction, seed: int) -> Placed:
    """The function that `fedllm.data.grouper.group` describes; RecipeError for one that cannot be made."""
    if not isinstance(key, str):
        if not callable(key):
            raise RecipeError(f"key = {key!r}: allowed is a function of one row, or text that starts with "
                              f"{', '.join(k + ':' for k in KINDS)}")
        return _own(key)
    kind, _, rest = key.partition(":")
    if kind not in KINDS or not rest:
        raise RecipeError(f"key = {key!r}: allowed is text that starts with {', '.join(k + ':' for k in KINDS)}"
                          f"{nearest(kind, KINDS)}")
    if kind == "call":
        return _own(_imported(key, rest))
    if kind == "column":
        return lambda row, place, where: _text(value_of(row, rest, where), where, f"field {rest!r}")
    if kind == "host":
        return lambda row, place, where: urlsplit(str(value_of(row, rest, where))).hostname or "no-host"
    if kind == "random":
        groups = _count(key, rest)
        return lambda row, place, where: _numbered(seed_of("group", seed, *place) % groups, groups)
    return _dirichlet(key, rest, seed)


def _own(fn: KeyFunction) -> Placed:
    name = getattr(fn, "__qualname__", repr(fn))

    def keyed(row: Mapping[str, Any], place: tuple[int, int], where: str) -> str:
        try:
            got = fn(row)
        except FedLLMError:
            raise
        except Exception as error:
            raise DataError(f"{where}: the key function '{name}' raised {type(error).__name__}: {error}; it must give "
                            f"a key for every row (this one has {names_in(row)})") from error
        return _text(got, where, f"the key function '{name}'")

    return keyed


def _text(value: Any, where: str, who: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise DataError(f"{where}: {who} gave bytes that are no UTF-8 text") from None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: {who} gave {value!r:.80}; a key is text, bytes or a whole number")


def _imported(key: str, rest: str) -> KeyFunction:
    module, _, name = rest.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"key = {key!r}: cannot be imported ({error}); it reads call:package.module:function"
                          ) from None


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"key = {key!r}: {text!r} is no number of groups; allowed is a whole number from 1")
    return int(text)


def _numbered(i: int, groups: int) -> str:
    return f"group-{i:0{len(str(groups - 1))}d}"


def _dirichlet(key: str, rest: str, seed: int) -> Placed:
    """For each label p_c ~ Dir(alpha 1_G) over the groups, then a row's group ~ p_c."""
    column, _, tail = rest.partition(":")
    count, _, alpha = tail.partition(":")
    groups = _count(key, count)
    try:
        concentration = float(alpha)
    except ValueError:
        concentration = 0.0
    if not 0 < concentration < float("inf"):
        raise RecipeError(f"key = {key!r}: {alpha!r} is no concentration; it reads dirichlet:COLUMN:GROUPS:ALPHA with "
                          "ALPHA above 0")

    @functools.lru_cache(maxsize=256)
    def shares(label: str) -> np.ndarray:
        p = numpy_stream("dirichlet", seed, label).dirichlet(np.full(groups, concentration))
        return np.cumsum(p)

    def keyed(row: Mapping[str, Any], place: tuple[int, int], where: str) -> str:
        edges = shares(repr(value_of(row, column, where)))
        u = seed_of("group", seed, *place) / 2**63 * edges[-1]
        return _numbered(min(int(np.searchsorted(edges, u, side="right")), groups - 1), groups)

    return keyed

"""Replies of a malicious site: made from an honest one by a small grammar, or of nothing but junk. Seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

JUNK: tuple[Any, ...] = (
    None, True, False, "", "abc", "[/red]\x1b[31m<script>", b"", b"\x00" * 40, -1, 0, 1, -5, 2**31, 2**63, 10**30, 0.5,
    -0.5, 1e308, -1e308, float("nan"), float("inf"), [], [[]], [1, [2, "a"]], ["a", 1], [True], [None], ["x"] * 50, {},
    {"a": 1}, (), set(), 1j, torch.tensor(float("nan")), torch.zeros(0), torch.tensor(1.0), torch.full((3,), 3e38),
    torch.zeros(2, 2), torch.ones(3, dtype=torch.int64), torch.tensor([-5]), torch.tensor([2**62]),
    torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.complex64), torch.zeros(1, 2, 3, 4),
    [["x", "float32", 10**6, 10**6, 10**6]], [["x", "float32", -2, -3]], [["x", "nonsense", 2]], "[[", "[[1],2]")
KEYS = ("n", "loss", "delta", "delta/x", "theta/x", "note/x", "note/mean", "note/energy", "refused", "ring", "layout",
        "", "/", "a/b/c", "x" * 5000, 7, None, ("a",), b"n")


def junk(rnd: random.Random) -> Any:
    """Anything at all."""
    return rnd.choice(JUNK)


def bent(rnd: random.Random, v: Any) -> Any:
    """A value much like an honest one, and not quite."""
    ways = [lambda: junk(rnd)]
    if isinstance(v, Tensor):
        ways += [lambda: v * 0, lambda: v[:0] if v.dim() else v, lambda: v.reshape(-1), lambda: v[None],
                 lambda: torch.cat([v.reshape(-1), v.reshape(-1)]), lambda: v.to(torch.float64), lambda: v.long(),
                 lambda: v.bool()]
        if v.is_floating_point():
            ways += [lambda: v.double() * 1e300, lambda: (v.double() + 1) * 1e30, lambda: -v * 100, lambda: v / 0]
        elif v.dtype != torch.bool:
            ways += [lambda: v - 7, lambda: v.long() + 10**9, lambda: ~v]
    elif isinstance(v, bool):
        ways += [lambda: int(v), lambda: str(v)]
    elif isinstance(v, int | float):
        ways += [lambda: -v - 1, lambda: v * 10**9, lambda: str(v), lambda: [v], lambda: v + 0.5]
    elif isinstance(v, list | tuple):
        ways += [lambda: list(v)[:-1], lambda: [*v, *v], lambda: list(reversed(v)), lambda: [list(v)],
                 lambda: [bent(rnd, x) for x in v], lambda: [*v, junk(rnd)]]
    elif isinstance(v, str):
        ways += [lambda: v + "x", lambda: v * 2000, lambda: v.encode()]
    elif isinstance(v, bytes):
        ways += [lambda: v[:-1], lambda: bytes(len(v)), lambda: v + b"x", lambda: v[::-1]]
    return rnd.choice(ways)()


def made(rnd: random.Random, honest: dict[str, Any]) -> Any:
    """One reply: of junk alone, or an honest one with a few things changed, lost, renamed or added."""
    roll = rnd.random()
    if roll < 0.08:
        return junk(rnd)
    if roll < 0.15:
        return {rnd.choice(KEYS): junk(rnd) for _ in range(rnd.randrange(5))}
    reply: dict[Any, Any] = dict(honest)
    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
        key = rnd.choice(list(reply)) if reply else "n"
        way = rnd.randrange(5)
        if way == 0:
            reply.pop(key, None)
        elif way == 1:
            reply[rnd.choice(KEYS)] = reply.get(key) if rnd.random() < 0.5 else junk(rnd)
        elif way == 2:
            other = rnd.choice(list(reply)) if reply else "n"
            reply[key], reply[other] = reply.get(other), reply.get(key)
        else:
            reply[key] = bent(rnd, reply.get(key))
    if rnd.random() < 0.1:
        reply = dict(rnd.sample(list(reply.items()), len(reply)))  # in another order
    return reply


def numbers(value: Any) -> Iterator[Any]:
    """All tensors and floats of a state."""
    if isinstance(value, dict):
        for v in value.values():
            yield from numbers(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from numbers(v)
    elif isinstance(value, Tensor | float):
        yield value


def finite(state: Any) -> bool:
    """Whether no number of a state is NaN or infinite."""
    return all(bool(torch.isfinite(torch.as_tensor(v)).all()) for v in numbers(state))

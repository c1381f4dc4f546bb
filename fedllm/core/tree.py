"""Trees of servers: which client hangs under which, and sums that run from the leaves to the root."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import Knobs, knob

Node = Sequence[Any]
"""A server: the ids of its own clients (text) and the servers below it (nodes), in any order. It may be empty."""
Path = tuple[int, ...]
"""Where a server stands: the places to go from the root, which is (). Children count from 0 among servers."""


@dataclass(frozen=True)
class Branching(Knobs):
    """What methods and layers that add up along a tree let a recipe say of it."""

    fan_out: tuple = knob((4,), "servers below the root, below each of them, ...; clients hang under the last ones")
    deal: Literal["blocks", "turns"] = knob("blocks", "neighbors in the data's order together, or dealt out by turns",
                                            options=("blocks", "turns"))
    tree: tuple = knob((), "a tree of one's own: nested lists of client ids (empty: `fan_out`)")

    def __post_init__(self) -> None:
        super().__post_init__()
        plant((), self.fan_out)
        list(servers(self.tree))

    def places(self, ids: Sequence[str]) -> dict[Path, list[str]]:
        """The servers under which these clients hang."""
        return groups(self.tree or plant(ids, self.fan_out, self.deal), ids)


def plant(ids: Sequence[str], fan_out: Sequence[int], deal: Literal["blocks", "turns"] = "blocks") -> Node:
    """A tree whose root has fan_out[0] servers below it, each of them fan_out[1], and so on; clients hang under the
    last ones, neighbors together (`blocks`) or dealt out like cards (`turns`)."""
    for width in fan_out:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise RecipeError(f"fan_out = {list(fan_out)}: allowed are whole numbers from 1, from the root down")
    if not fan_out:
        return tuple(ids)
    width, n = fan_out[0], len(ids)
    parts = ([ids[i::width] for i in range(width)] if deal == "turns" else
             [ids[i * n // width : (i + 1) * n // width] for i in range(width)])
    return tuple(plant(part, fan_out[1:], deal) for part in parts)


def check_tree(node: Any, ids: Sequence[str], key: str) -> None:
    """Refuse a tree of one's own that does not hold each client once."""
    found = [c for _, clients in servers(node) for c in clients]
    if odd := [c for c in found if c not in ids or found.count(c) > 1]:
        why = "is no client" if odd[0] not in ids else f"stands at {found.count(odd[0])} places"
        raise RecipeError(f"{key}: {odd[0]!r} {why}; each of {', '.join(ids[:8])} must stand once")
    if left := [c for c in ids if c not in found]:
        raise RecipeError(f"{key}: {', '.join(left[:8])} hang under no server; each client must stand once")


def servers(node: Any, path: Path = ()) -> Iterator[tuple[Path, list[str]]]:
    """Every server with its own clients, the root first; refuses what is neither a client nor a server."""
    below = [child for child in node if not isinstance(child, str)]
    if odd := [child for child in below if not isinstance(child, list | tuple)]:
        raise RecipeError(f"a tree holds {odd[0]!r}: allowed are client ids and lists of these")
    yield path, [child for child in node if isinstance(child, str)]
    for i, child in enumerate(below):
        yield from servers(child, (*path, i))


def groups(node: Any, ids: Sequence[str]) -> dict[Path, list[str]]:
    """Each server that has clients among `ids`, with these."""
    there = set(ids)
    return {path: mine for path, clients in servers(node) if (mine := [c for c in clients if c in there])}


def climb(sums: Mapping[Path, Any], plus: Callable[[Any, Any], Any],
          send: Callable[[Any], Any] = lambda total: total) -> tuple[Any, dict[Path, Any]]:
    """(sum at the root, what each server below it sends up): the deepest first, every server adds its own clients' sum
    and those of the servers below it. `plus(acc, part)` may change `acc`, `plus({}, part)` is a copy, and `send` makes
    a part of a total."""
    totals: dict[Path, Any] = {}
    for path in sorted({p[:k] for p in sums for k in range(len(p) + 1)}, key=lambda p: (-len(p), p)):
        below = [total for q, total in totals.items() if q[:-1] == path and len(q) == len(path) + 1]
        total: Any = functools.reduce(plus, [*([sums[path]] if path in sums else []), *below], {})
        totals[path] = send(total) if path else total
    return totals.pop((), None), totals

"""Who talks to whom where there is no server: graphs over the clients of a round, and the weights of their edges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedllm.core.errors import RecipeError
from fedllm.core.payload import Tree, add, sub
from fedllm.core.rng import numpy_stream

GRAPHS = ("ring", "torus", "exponential", "random", "complete")
Graph = dict[str, list[str]]
"""Each client's neighbors, in the clients' order; an edge stands at both of its ends."""


def graph_of(kind: str, ids: Sequence[str], degree: int = 4, *key: object) -> Graph:
    """A connected graph of this kind. `degree` is that of `random`, whose draw depends on `key` alone."""
    n = len(ids)
    if kind == "ring":
        pairs = ring(range(n))
    elif kind == "torus":
        pairs = torus(n)
    elif kind == "exponential":  # each client and those 1, 2, 4, 8, ... places on
        pairs = {(i, (i + hop) % n) for i in range(n) for hop in (1 << p for p in range((n - 1).bit_length()))}
    elif kind == "random":  # cycles through all in random orders: connected whatever the draw
        rng = numpy_stream("graph", *key)
        pairs = set().union(*(ring(rng.permutation(n).tolist()) for _ in range(math.ceil(degree / 2))))
    elif kind == "complete":
        pairs = {(i, j) for i in range(n) for j in range(i)}
    else:
        raise RecipeError(f"method.graph = {kind!r} is not allowed; it must be one of {list(GRAPHS)}")
    return joined(ids, ((ids[i], ids[j]) for i, j in pairs))


def ring(order: Sequence[int]) -> set[tuple[int, int]]:
    """Each with the next, and the last with the first."""
    return {(order[i], order[(i + 1) % len(order)]) for i in range(len(order))}


def torus(n: int) -> set[tuple[int, int]]:
    """A grid whose borders meet, as near to a square as n allows; a prime number of clients makes none."""
    rows = next((r for r in range(math.isqrt(n), 1, -1) if n % r == 0), 0)
    if not rows:
        near = [m for m in range(max(4, n - 3), n + 4) if any(m % r == 0 for r in range(2, math.isqrt(m) + 1))]
        raise RecipeError(f"method.graph = 'torus' needs rows x columns of clients, at least 2 x 2, and a round has {n}"
                          f"; {' or '.join(map(str, near[:4]))} clients make one, or use 'ring' or 'exponential'")
    cols = n // rows
    at = lambda r, c: (r % rows) * cols + c % cols  # noqa: E731
    return {(at(r, c), other) for r in range(rows) for c in range(cols) for other in (at(r + 1, c), at(r, c + 1))}


def joined(ids: Sequence[str], edges: Iterable[tuple[str, str]]) -> Graph:
    """The neighbors that these edges make; an edge to oneself is none."""
    near: dict[str, set[str]] = {c: set() for c in ids}
    for a, b in edges:
        if a != b:
            near[a].add(b)
            near[b].add(a)
    place = {c: i for i, c in enumerate(ids)}
    return {c: sorted(others, key=place.__getitem__) for c, others in near.items()}


def need_connected(ids: Sequence[str], edges: Sequence[Sequence[str]]) -> None:
    """Refuse edges that name strangers or leave the clients in parts that never hear of each other."""
    for edge in edges:
        pair = isinstance(edge, list | tuple) and len(edge) == 2
        if not pair or (odd := [c for c in edge if c not in ids]):
            what = f"{odd[0]!r:.80} is no client" if pair else "an edge is a pair of client ids"
            raise RecipeError(f"method.edges holds {edge!r:.200}: {what}; the data has {', '.join(ids[:12])}")
    near, parts = joined(ids, ((a, b) for a, b in edges)), []
    left = dict.fromkeys(ids)
    while left:
        part, edge_of = set(), [next(iter(left))]
        while edge_of:
            c = edge_of.pop()
            if c not in part:
                part.add(c)
                left.pop(c, None)
                edge_of += near[c]
        parts.append(sorted(part))
    if len(parts) > 1:
        shown = " | ".join(", ".join(p[:4]) + (", ..." if len(p) > 4 else "") for p in parts[:3])
        raise RecipeError(f"method.edges joins the {len(ids)} clients to {len(parts)} parts that never hear of each "
                          f"other ({shown}); add edges until there is one part")


def metropolis(near: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """W_ij = 1 / (1 + max(deg_i, deg_j)) on edges, symmetric; what is left of 1 is a client's own weight, so that W is
    doubly stochastic, also when an edge that fails gives its weight back to both ends."""
    return {i: {j: 1 / (1 + max(len(near[i]), len(near[j]))) for j in others} for i, others in near.items()}


def mixed(mine: Tree, opened: Sequence[tuple[float, Tree]]) -> Tree:
    """mine + sum_j W_ij (theirs_j - mine): the own weight is what the others leave of 1."""
    out = mine
    for w, theirs in opened:
        out = add(out, sub(theirs, mine), w)
    return out


def spectral_gap(near: Mapping[str, Sequence[str]]) -> float:
    """1 - |second eigenvalue of W|: how fast neighbors' averages become everyone's."""
    import numpy as np

    ids, w = list(near), metropolis(near)
    m = np.array([[w[i].get(j, 0.0) for j in ids] for i in ids])
    m += np.diag(1 - m.sum(1))
    return float(1 - sorted(np.abs(np.linalg.eigvalsh(m)))[-2]) if len(ids) > 1 else 1.0

"""Which rows a round under shared noise reads, and how its noise hangs together with that of the rounds before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.rng import numpy_stream
from fedllm.privacy.accountant import Release

FINEST = 8.0
"""Quanta of a share's standard deviation below which a sum of shares would no longer be as good as a Gaussian."""


@dataclass(frozen=True)
class Every:
    """All rows in every round, each under noise of its own: DP-SGD at full batches."""

    parts = 1
    """In one round of so many is a row read, and paid for."""
    draws = 1
    """Draws of its noise that a client's sum may carry at the most."""
    finest = FINEST
    sensitivity = 1.0
    """How far a row moves all that it is paid for once, in clips."""

    def release(self, z: float) -> Release:
        """What a row pays for at a time."""
        return Release(z / self.sensitivity, law="discrete")

    def left(self, rounds: int) -> int:
        """Draws of noise that are in the sum of so many rounds."""
        return rounds

    def count(self, n: int, t: int) -> int:
        """How many of a client's n rows round t reads."""
        return len(range((t - 1) % self.parts, n, self.parts))

    def rows(self, client: str, n: int, t: int) -> np.ndarray:
        """Which of them."""
        return np.arange(n)

    def due(self, state: Any, client: str, t: int) -> bool:
        """Whether the rows that round t reads of this client are to be paid for now."""
        return True

    def told(self, state: Any, client: str, t: int) -> dict[str, Any]:
        """What a client must know of the round."""
        return {}

    def heard(self, state: Any, clients: Sequence[str], t: int) -> None:
        """Whose sums were opened."""

    def begin(self, book: dict[str, Any], t: int) -> bool:
        """At the client: whether this round is to be paid for."""
        return True

    def noise(self, book: dict[str, Any], t: int, last: int, fresh: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a client adds to its sum."""
        return fresh


@dataclass(frozen=True)
class Tree(Every):
    """A part of the rows in turn, each row once in `span` rounds, under the noise of a tree over them: DP-FTRL.

    In round i of a span a client draws noise for the node that ends at i, and takes off that of the nodes in it which
    it still holds, so that the sum of all rounds so far carries the live nodes alone. Who does not answer draws nothing
    and takes nothing off; its nodes stay in the sums until it answers for one that holds them. So, whoever is missing
    when: of a row's weight in all prefix sums that part which a client lets go at a node lies with those who answer
    there, who are `least` or more, and with nobody twice; each node that holds the row costs it what it would cost if
    all were there, and there are log2(span) + 1 of them. A client whose book is not what the server has heard of (it
    lost its memory, or an opened round was undone) begins with no node: what it forgot stays in, and hides more.
    """

    span: int

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.span

    @property
    def draws(self) -> int:  # type: ignore[override]
        return self.span  # of disjoint nodes within one of `span` leaves

    @property
    def depth(self) -> int:
        """Nodes that hold one leaf, at the most."""
        return self.span.bit_length()

    @property
    def finest(self) -> float:  # type: ignore[override]
        return FINEST * math.sqrt(1 + self.depth)  # sums of unlike nodes of several clients are on coarser lattices

    @property
    def sensitivity(self) -> float:  # type: ignore[override]
        return math.sqrt(self.depth)

    def left(self, rounds: int) -> int:
        spans, rest = divmod(rounds, self.span)
        return spans * self.span.bit_count() + rest.bit_count()

    def rows(self, client: str, n: int, t: int) -> np.ndarray:
        order = numpy_stream("dp_ftrl", client, n).permutation(n)  # public, and the same in every run
        return np.sort(order[(t - 1) % self.span :: self.span])

    def due(self, state: Any, client: str, t: int) -> bool:
        """Once in a span, for all rows, of which each is read once in it."""
        paid, now = state.setdefault("paid", {}), (t - 1) // self.span
        before, paid[client] = paid.get(client), now
        return before != now

    def told(self, state: Any, client: str, t: int) -> dict[str, Any]:
        return {"last": state.setdefault("last", {}).get(client, 0)}

    def heard(self, state: Any, clients: Sequence[str], t: int) -> None:
        state.setdefault("last", {}).update(dict.fromkeys(clients, t))

    def begin(self, book: dict[str, Any], t: int) -> bool:
        if t <= book.get("t", 0):
            raise PayloadError(f"round {t} of dp_ftrl is asked for after round {book['t']}: its rows have been read")
        before, book["span"] = book.get("span"), (t - 1) // self.span
        return before != book["span"]

    def noise(self, book: dict[str, Any], t: int, last: int, fresh: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        i = (t - 1) % self.span + 1
        known = book.get("t", 0) == last > t - i  # of this span, and in a sum that was opened
        live = book.get("live", []) if known else []
        begin = i - (i & -i)
        old = [node for end, node in live if end > begin]
        book["t"], book["live"] = t, [*(entry for entry in live if entry[0] <= begin), [i, dict(fresh)]]
        return {k: f - sum(node[k] for node in old) for k, f in fresh.items()}

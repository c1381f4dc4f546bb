"""Who is asked in a round: selectors, one protocol for every method."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import ClientId, Program
from fedllm.core.client import ClientInfo
from fedllm.core.errors import CompositionError
from fedllm.core.knobs import Knobs
from fedllm.core.layer import Layer, name_of
from fedllm.core.method import Method, State


@dataclass(frozen=True)
class Turn:
    """What a selector sees when a round begins."""

    clients: Sequence[ClientInfo]
    want: int
    round: int
    rng: np.random.Generator
    """This round's stream; the same whoever answered first in the rounds before."""
    state: MutableMapping[str, Any]
    """The selector's own; checkpointed with the run."""
    method: Method
    model: State
    """The method's state."""


class Selector(Knobs, Layer):
    """Chooses each round's clients. One that `hears` stands on the stack next to the wire, like any layer: its client
    half tells what it wants to know of a client (`note/...` in the reply), its server half reads that."""

    hears: ClassVar[bool] = False

    def pick(self, turn: Turn) -> Sequence[ClientId]:
        """The chosen clients, for a selector that asks nobody first."""
        raise NotImplementedError

    def choose(self, turn: Turn) -> Program:
        """A program that returns the chosen clients; it may ask questions of its own."""
        yield from ()
        return self.pick(turn)

    def check_stack(self, layers: Sequence[Layer]) -> None:
        """Raise CompositionError where choosing by what clients tell would break another layer's promise."""
        for layer in layers:
            if self.hears and layer.algebra.kind == "dp":
                raise CompositionError(f"selector '{name_of(self)}' reads clients' losses without noise and layer "
                                       f"'{name_of(layer)}' promises privacy, so they do not fit together; use "
                                       "select: uniform or by_size")


def known(turn: Turn) -> list[ClientInfo]:
    """All clients, when no more are there than are wanted; else none."""
    return list(turn.clients) if turn.want >= len(turn.clients) else []

"""Layers wrap every Ask that passes: privacy, compression, attacks and defenses, each with both its halves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedllm.core.ask import Ask, Program
from fedllm.core.card import Card
from fedllm.core.payload import Payload


@dataclass(frozen=True)
class Facts:
    """What a layer may know of its run before it starts."""

    rows: Mapping[str, int] = field(default_factory=dict)
    """Training rows of each client of the federation."""
    cohort: int = 0
    """Clients asked in a round."""
    rounds: int = 0
    local: Any = None
    """How the recipe has clients train."""
    below: Sequence[Layer] = ()
    """The layers between this one and the wire."""
    size: int = 0
    """Numbers that are trained; 0: not known."""
    guessed: bool = False
    """Whether `rows` is one site's own count for everybody, since nobody tells a site the others'."""


@dataclass(frozen=True)
class Algebra:
    """What a layer asks of the others in its stack; `privacy.composition` refuses stacks that cannot hold."""

    kind: Literal["plain", "dp", "secagg", "he", "codec", "robust", "attack", "tree", "line", "meter"] = "plain"
    needs: Literal["any", "sum", "set"] = "any"
    """What it must get from below: any replies, one sum, or every single reply (Krum, median)."""
    reveals: Literal["each", "sum"] = "each"
    """What the server sees of the replies above it."""
    additive: bool = True
    """Whether the sum of what it sends decodes to the sum."""
    contracts: bool = True
    """Whether what it sends decodes to nothing longer than what it got, so that a clip above it still holds."""
    compresses: bool = False
    """Whether it drops or rounds entries, as codecs do, beside what its kind says."""
    reads: bool = False
    """Whether it lets out something that it reads from rows by itself, without noise."""
    whole: bool = False
    """Whether it sends whole numbers, which must arrive to the last bit."""
    shares: bool = False
    """Whether each client adds a share of its noise only, so that nobody may see less than the sum."""
    ring: bool = False
    """Whether whole numbers add up exactly under it, mod 2^32, and none of them can be read."""
    instead: str = ""
    """What works in its place where it cannot stand."""


class Layer:
    """A step of the protocol stack. Layers are listed from the method down to the wire.

    On the way down and at the server `server` sees the Ask; on the client `client` is climbed from the wire up, so
    that a layer listed first touches the reply first (DP clips before SecAgg masks). A question of a layer's own
    without a reducer carries no client data, and every layer below lets it pass.
    """

    algebra: ClassVar[Algebra] = Algebra()
    session: ClassVar[tuple[str, ...]] = ()
    """Keys of which a message holds one when this layer is at work; a site that holds to its layers refuses training
    without. Empty: the client half needs to be told nothing."""

    names: ClassVar[tuple[str, ...]] = ()
    """Names of its own that stand in layouts of what it sends."""

    secrets: ClassVar[tuple[str, ...]] = ()
    """Keys of its state that nobody may read after the run: they leave its checkpoints when the run ends."""

    asks: ClassVar[int] = 1
    """How often it has the method's own question asked in a round."""

    tells: ClassVar[tuple[str, ...]] = ()
    """Keys of its replies that hold text about the client's machine, and never about its rows."""

    by_example: ClassVar[bool] = False
    """Whether it has each example's own gradient clipped while a client trains."""

    optional: ClassVar[bool] = False
    """Whether it only counts, so that a coordinator may ask a site with it or without."""

    at_home: ClassVar[bool] = False
    """Whether it stands over what the server asks of itself too (`on_server`): a ledger, which changes nothing."""

    card: ClassVar[Card | None] = None
    """What it says about itself, with a claim that `make claims` measures as it does those of methods."""

    def bind(self, facts: Facts) -> Layer:
        """The layer for this run: what depends on its size is worked out, and refused, before it starts."""
        return self

    def init(self) -> MutableMapping[str, Any]:
        """The layer's state at the start: accountant, residue, adaptive clip. Checkpointed with the run."""
        return {}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        """Raise CompositionError when this layer would be unsound over `method` (reducers: by client function)."""

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        """Pass the ask on (changed or not), may ask questions of its own, return the Replies."""
        return (yield ask)

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        """`call(msg)` runs what lies above; change the message before it and the reply after it."""
        return call(msg)

    def foresee(self, facts: Facts) -> Mapping[str, Any] | None:
        """What the bound layer expects of a whole run: `epsilon`, `delta`, `noise_multiplier`, `rounds_that_fit`."""
        return None

    def unlimited(self) -> Layer:
        """The bound layer without its budget: a plan's trial rounds are not the run's."""
        return self

    def warns(self, steps: float, tried: int) -> Sequence[str]:
        """What a plan's trial rounds, of at most `tried` local steps, tell this layer of the run's, which have `steps`.
        """
        return ()

    def doubts(self, asked: int, odds: float) -> Sequence[str]:
        """What a plan says where of so many clients asked each answers with these odds."""
        return ()

    def facts(self, state: MutableMapping[str, Any]) -> Mapping[str, Any] | None:
        """What it adds to the record of the round that has just ended, asked once a round. None: nothing."""
        return None

    def report(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What it adds to the run's result, under `reports`. None: nothing."""
        return None

    def statement(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What it can say about the run's privacy; `void` lists what takes its claim away. None: nothing."""
        return None


def name_of(part: object) -> str:
    """A layer, method, space or selector (or its class) as a recipe calls it: the stem of its file. A key's message
    begins with the class (`Krum.f = 3`), in whose place `runs.build.by_key` puts the key's path."""
    kind = part if isinstance(part, type) else type(part)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)  # a plugin's module is called otherwise
    return Path(file).stem if file else kind.__name__

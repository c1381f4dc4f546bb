"""What a method says: `Ask` some clients to run one of my functions, and get `Replies`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedllm.core.form import ANY, Form
from fedllm.core.payload import Payload
from fedllm.core.reduce import Reducer

ClientId = str


def on_client(reduce: Reducer | None = None, gives: str | None = None,
              fits: Callable[[Any, Payload, Payload], None] | None = None, *, test: bool = False, sealed: bool = False
              ) -> Callable[[Callable], Callable]:
    """Mark a function that runs on clients, and say how its replies are folded (None: kept one by one).

    `gives` says what a reply holds, as `core.form` reads it: `"delta: tree, n: count, loss?: number"`. Servers refuse
    any other reply by its client's name, and sites know by it what would leave them. Without it nothing is known.
    `fits(method, msg, reply)` raises PayloadError for values that the server's half could not use: a rank that nobody
    has, an index out of range. `test`: it scores on held-out rows and trains nothing, so that it may run where no layer
    stands. `sealed`: its replies hold keys, signatures and sealed letters, bytes that are no words of rows.
    """
    form = None if gives is None else Form.of(gives)

    def mark(fn: Callable) -> Callable:
        fn.__dict__.update(reduce=reduce, runs_on_client=True, form=form, fits=fits, test=test, sealed=sealed)
        return fn

    return mark


def on_server(fn: Callable) -> Callable:
    """Mark a function that the server asks of itself, and that sees public rows alone: no layer touches it."""
    fn.__dict__.update(reduce=None, runs_on_client=True, on_server=True, form=None, fits=None)
    return fn


@dataclass(frozen=True)
class Ask:
    """One question to some clients: run this function of mine with these messages.

    `quorum` is how many answers are enough: a float is a share of those asked, an int a count, None leaves it to the
    recipe. `deadline` is in seconds from the moment of asking; a client that is silent by then is `missing`.
    So many answers as `enough` says close the ask: who comes later is `missing` too, and what it did does not count.

    With `grace`, answers count that come so many seconds later at the most: a function of how long those that were
    enough took.

    With `flight`, so many clients are at work at a time: when one has answered, the next of `msgs` begins (and, if
    `enough` says for how many answers to wait, those that have answered begin once more after the last). Whoever is
    at work when the ask closes stays at work, is not asked again meanwhile, and answers a later ask of this phase.
    """

    fn: Callable[[Payload, Any], Payload]
    msgs: Mapping[ClientId, Payload]
    reduce: Reducer | None = None
    quorum: float | int | None = None
    deadline: float | None = None
    enough: int | None = None
    grace: Callable[[Sequence[float]], float] | None = None
    flight: int | None = None
    form: Form | None = None
    """What a reply must be, where a layer lifts, masks or encrypts it; None: as the function says."""
    opened: Callable[[ClientId, Payload], Payload] | None = None
    """Takes a layer's coding off a reply, before anything else is asked of it; raises PayloadError where it cannot."""

    hidden: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Layer -> keys of a reply of which nobody but its clients can read the values by themselves: masked, encrypted or
    sealed. The record says so."""

    @property
    def owner(self) -> Any:
        return self.fn.__self__  # type: ignore[attr-defined]

    @property
    def phase(self) -> str:
        """`Owner.function`: the name under which the client half is found and bytes are booked."""
        return f"{type(self.owner).__name__}.{self.fn.__name__}"

    @property
    def at_home(self) -> bool:
        """Whether the server asks itself; nothing of this crosses a wire."""
        return "on_server" in self.fn.__dict__

    @property
    def reducer(self) -> Reducer | None:
        return self.reduce or self.fn.__dict__.get("reduce")

    @property
    def expects(self) -> Form | None:
        """What a reply must be; None: nobody says."""
        return self.form or self.fn.__dict__.get("form")

    def fits(self, client: ClientId, reply: Payload) -> None:
        """PayloadError where the server's half could not use these values; a layer's form has none of the function's.
        """
        if self.form is None and (holds := self.fn.__dict__.get("fits")) is not None:
            holds(self.owner, self.msgs.get(client, {}), reply)

    def coded(self, decode: Callable[[Payload], Payload], **changes: Any) -> Ask:
        """The same ask of replies that a layer has coded."""
        above = self.opened or (lambda client, reply: reply)
        return replace(self, opened=lambda client, reply: above(client, decode(reply)), **changes)

    def lifted(self) -> Form:
        """What a reply must be where the client has lifted it for a sum: the names are the reducer's own."""
        known = self.expects
        n = {"n": known.parts["n"]} if known is not None and "n" in known.parts else {}
        return Form({**n, ANY: "summand"}, frozenset(n))

    def needed(self, default: float | int = 1) -> int:
        """How many answers are enough, as a count (at least one, unless the ask says 0: then none is)."""
        quorum = default if self.quorum is None else self.quorum
        return max(int(quorum != 0), quorum if isinstance(quorum, int) else math.ceil(len(self.msgs) * quorum - 1e-9))


@dataclass(frozen=True)
class Replies(Mapping[ClientId, Payload]):
    """Who answered what. With a reducer only `value` is filled, never `each`.

    `missing` maps each silent or refused client to the reason. `notes` is what a client's reply says beside what is
    folded (keys `note/...`), and `seconds` how long its answer took, on the clock of the engine.
    """

    each: Mapping[ClientId, Payload] = field(default_factory=dict)
    value: Payload | None = None
    answered: tuple[ClientId, ...] = ()
    missing: Mapping[ClientId, str] = field(default_factory=dict)
    notes: Mapping[ClientId, Payload] = field(default_factory=dict)
    seconds: Mapping[ClientId, float] = field(default_factory=dict)
    folded: tuple[ClientId, ...] = ()
    """In the order in which their replies were folded, whose count and whose the others outvoted."""

    def __getitem__(self, key: ClientId) -> Payload:
        return self.each[key]

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)


Program = Generator["Ask | Sequence[Ask]", Any, Any]
"""Yields an Ask (or a list of Asks that run side by side), is sent Replies (or a list), returns the next state."""

"""Driving programs: the loop between those who ask and the engine that answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fedllm.core.ask import Ask, ClientId, Program, Replies
from fedllm.core.client import SERVER
from fedllm.core.errors import PayloadError, QuorumError, plain
from fedllm.core.form import KINDS
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload, length, non_finite, part


class Engine(Protocol):
    """The only place that does I/O."""

    def send(self, asks: Sequence[Ask]) -> Sequence[Replies]: ...


def drive(program: Program, engine: Engine, layers: Sequence[Layer] = (),
          states: Sequence[MutableMapping[str, Any]] | None = None) -> Any:
    """Run one program to its end and return what it returns."""
    states = [layer.init() for layer in layers] if states is None else states
    return drive_all([program], engine, layers, states)[0]


def drive_all(programs: Sequence[Program], engine: Engine, layers: Sequence[Layer],
              states: Sequence[MutableMapping[str, Any]]) -> list[Any]:
    """Step many programs together, so that all they ask travels in one trip.

    A layer's server half is itself a program over the layers below it: that is the recursion. Where a question comes to
    nothing (QuorumError), all of them are closed at once, so that what they do `finally` is done before the next round.
    """
    try:
        return _stepped(programs, engine, layers, states)
    finally:
        for program in programs:
            program.close()


def _stepped(programs: Sequence[Program], engine: Engine, layers: Sequence[Layer],
             states: Sequence[MutableMapping[str, Any]]) -> list[Any]:
    waiting: dict[int, Ask | Sequence[Ask]] = {}
    ended: dict[int, Any] = {}

    def step(i: int, answer: Any) -> None:
        try:
            waiting[i] = programs[i].send(answer)
        except StopIteration as end:
            ended[i] = end.value
            waiting.pop(i, None)

    for i in range(len(programs)):
        step(i, None)
    while waiting:
        now = dict(waiting)
        asks = [a for asked in now.values() for a in ([asked] if isinstance(asked, Ask) else asked)]
        answers = iter(_send(asks, engine, layers, states))
        for i, asked in now.items():
            step(i, next(answers) if isinstance(asked, Ask) else [next(answers) for _ in asked])
    return [ended[i] for i in range(len(programs))]


def _send(asks: Sequence[Ask], engine: Engine, layers: Sequence[Layer],
          states: Sequence[MutableMapping[str, Any]]) -> Sequence[Replies]:
    if not layers:
        return engine.send(asks)
    top, state = layers[0], states[0]
    passes = Layer()
    seen = [passes if ask.at_home and not top.at_home else top for ask in asks]
    return drive_all([over.server(ask, state) for over, ask in zip(seen, asks, strict=True)], engine, layers[1:],
                     states[1:])


def serve(stack: Sequence[Any], phase: str, msg: Payload, client: Any,
          check: Callable[[Payload], None] = lambda payload: None) -> Payload:
    """The client half: climb from the wire to whoever asked, through the layers below it.

    `stack` is the method followed by its layers. Only functions marked `@on_client` can be called. `check` looks at
    what the function is told and at what it answers, as no layer has changed it yet, and raises where that may not be.
    """
    owner, _, name = phase.partition(".")
    at = next((i for i, part in enumerate(stack) if type(part).__name__ == owner), None)
    marked = getattr(type(stack[at]), name, None) if at is not None else None
    if at is None or not getattr(marked, "runs_on_client", False):
        raise PayloadError(f"phase '{phase}' is not a client function of {[type(p).__name__ for p in stack]}")
    fn = getattr(stack[at], name)
    if "on_server" in fn.__dict__:
        if client.id != SERVER:
            raise PayloadError(f"phase '{phase}' is the server's own and was asked of '{client.id}'")
        with client.through(lambda request: request, f"'{phase}' runs at the server and may use public rows alone"):
            call = lambda m: fn(m, client)  # noqa: E731
            for layer in stack[at + 1 :]:
                if layer.at_home:
                    call = functools.partial(layer.client, fn, client=client, call=call)
            return call(msg)

    def climb(i: int, msg: Payload) -> Payload:
        if i == at:
            check(msg)
            reply = fn(msg, client)
            check(reply)
            return reply
        return stack[i].client(fn, msg, client, lambda m: climb(i - 1, m))

    return climb(len(stack) - 1, msg)


NOTES = ("tensor", "number", "name", "names")
"""Kinds of what a reply says beside what is folded."""

FARTHEST = 1e6
"""How much longer than what the client was told (or than 1) a reply may be, by default: a sane client's is shorter."""


@dataclass
class Pile:
    """Replies of the same names and shapes, folded as they come."""

    acc: Any
    clients: list[ClientId] = field(default_factory=list)


class Fold:
    """Folds the answers to one ask as they come; take them in the order of the ask and the result is bit-stable.

    No reply, of whatever type, order or size, stops the fold: what is not as the function declares, holds NaN or an
    infinity, is far too long, or is nothing that the reducer can take is left out and named. Where replies differ in
    names or shapes, those of most clients count, never those of who came first.
    """

    def __init__(self, ask: Ask, quorum: float | int = 1, farthest: float = FARTHEST,
                 rows: Mapping[ClientId, float] | None = None) -> None:
        """`rows`: how many each client said to have when it joined, where that is known."""
        self.rows = rows or {}
        self.ask, self.needed, self.reducer = ask, ask.needed(quorum), ask.reducer
        self.farthest = farthest
        self.form = None if ask.expects is None else ask.expects.bound(ask.msgs)
        self.piles: dict[Any, Pile] = {}
        self.each: dict[ClientId, Payload] = {}
        self.taken: list[ClientId] = []
        self._lengths: dict[tuple[int, ...], float] = {}
        self.missing: dict[ClientId, str] = {}
        self.notes: dict[ClientId, Payload] = {}
        self.seconds: dict[ClientId, float] = {}

    @property
    def answered(self) -> list[ClientId]:
        """Whose replies count, as it stands."""
        return max((p.clients for p in self.piles.values()), key=len, default=[])

    @property
    def full(self) -> bool:
        """Whether so many answers count as close the ask."""
        return self.ask.enough is not None and len(self.answered) >= self.ask.enough

    def miss(self, client: ClientId, why: str) -> None:
        """This client gives no answer, or none that counts."""
        self.missing[client] = plain(why)

    def take(self, client: ClientId, reply: Payload, seconds: float | None = None) -> bool:
        """One answer, and how long it took where the engine says so; whether it may count."""
        try:
            reply, notes = self._checked(client, reply)
            pile = self._fold(reply)
        except Exception as error:  # whatever a stranger's reply does to the fold, the round goes on
            why = str(error) if isinstance(error, PayloadError) else f"{type(error).__name__}: {error}"
            self.miss(client, f"reply refused: {why}")
            return False
        pile.clients.append(client)
        self.taken.append(client)
        if self.reducer is None:
            self.each[client] = reply
        self.missing.pop(client, None)  # an earlier answer of its may have been refused
        if notes:
            self.notes[client] = notes
        if seconds is not None:
            self.seconds[client] = seconds
        return True

    def _checked(self, client: ClientId, reply: Payload) -> tuple[Payload, Payload]:
        """The reply without layers' coding, and its notes; PayloadError where it cannot count."""
        if not isinstance(reply, Mapping):
            raise PayloadError(f"a reply is {type(reply).__name__}, allowed is a mapping")
        if odd := [key for key in reply if not isinstance(key, str)]:
            raise PayloadError(f"a part is named by {type(odd[0]).__name__}, allowed is text")
        if bad := non_finite(reply):
            raise PayloadError(f"'{bad[:80]}' holds NaN or infinity")
        if self.ask.opened is not None:
            reply = self.ask.opened(client, reply)
            if bad := non_finite(reply):
                raise PayloadError(f"'{bad[:80]}' holds NaN or infinity")
        notes = part(reply, "note")
        if self.form is not None:
            declared = {k: v for k, v in reply.items() if not k.startswith("note/") or k in self.form.parts}
            self.form.check(declared, self.rows.get(client))
        if notes:
            reply = {key: v for key, v in reply.items() if not key.startswith("note/")}
        for name, note in notes.items():
            known = self.form is not None and f"note/{name}" in self.form.parts
            if not known and not any(KINDS[kind][1](note) for kind in NOTES):
                raise PayloadError(f"'note/{name[:80]}' is {type(note).__name__}, allowed is {' or '.join(NOTES)}")
        far = self.farthest * max(1.0, self._told(client))
        if not (long := length(reply)) <= far:
            raise PayloadError(f"its tensors are {long:.3g} long, allowed is {far:.3g}")
        self.ask.fits(client, reply)
        return reply, notes

    def _told(self, client: ClientId) -> float:
        """How long the client's message is; messages that hold the same tensors are measured once."""
        msg = self.ask.msgs.get(client, {})
        key = tuple(map(id, msg.values()))
        if key not in self._lengths:
            self._lengths[key] = length(msg)
        return self._lengths[key]

    def _fold(self, reply: Payload) -> Pile:
        if self.reducer is None:
            return self.piles.setdefault(None, Pile(None))
        ragged = getattr(self.reducer, "ragged", False)
        sign = (None if ragged is True else ragged(reply) if callable(ragged) else frozenset(
            (k, str(tuple(v.shape)) if isinstance(v, Tensor) else "") for k, v in reply.items()))
        known = self.piles.get(sign)
        pile = known if known is not None else Pile(self.reducer.zero())
        pile.acc = self.reducer.add(pile.acc, reply)
        if known is None:
            self.piles[sign] = pile
        return pile

    def outvoted(self) -> dict[ClientId, str]:
        """Whose reply does not count because most clients' replies have other names or shapes."""
        mine = self.answered
        most = next((sign for sign, pile in self.piles.items() if pile.clients is mine), None)
        out: dict[ClientId, str] = {}
        for sign, pile in self.piles.items():
            if sign != most:
                key, shape = min(sign ^ most, key=lambda one: (one not in sign, one))
                out |= dict.fromkeys(pile.clients, "reply refused: its names or shapes are not as in the other replies "
                                                   f"('{str(key)[:80]}' {shape or ''})")
        return out

    def done(self) -> Replies:
        """Who answered what; raises QuorumError when too few did."""
        for client, why in self.outvoted().items():
            self.miss(client, why)
        answered = self.answered
        if len(answered) < self.needed:
            why = "; ".join(f"{cid}: {reason}" for cid, reason in list(self.missing.items())[:5])
            raise QuorumError(f"{self.ask.phase}: {len(answered)} of {len(self.ask.msgs)} clients answered, "
                              f"{self.needed} needed ({why})")
        acc = next((p.acc for p in self.piles.values() if p.clients is answered), None)
        value = self.reducer.done(acc) if self.reducer and answered else None
        notes = {c: v for c, v in self.notes.items() if c in answered}
        seconds = {c: v for c, v in self.seconds.items() if c in answered}
        return Replies(self.each, value, tuple(answered), self.missing, notes, seconds, tuple(self.taken))


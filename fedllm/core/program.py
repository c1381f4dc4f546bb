"""Driving programs: the loop between those who ask and the engine that answers."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from fedllm.core.ask import Ask, ClientId, Program, Replies
from fedllm.core.client import SERVER
from fedllm.core.errors import PayloadError, QuorumError
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload, non_finite, part


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

    A layer's server half is itself a program over the layers below it: that is the recursion.
    """
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
    return drive_all([(passes if ask.at_home else top).server(ask, state) for ask in asks], engine, layers[1:],
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
            return fn(msg, client)

    def climb(i: int, msg: Payload) -> Payload:
        if i == at:
            check(msg)
            reply = fn(msg, client)
            check(reply)
            return reply
        return stack[i].client(fn, msg, client, lambda m: climb(i - 1, m))

    return climb(len(stack) - 1, msg)


class Fold:
    """Folds the answers to one ask as they come; take them in the order of the ask and the result is bit-stable.

    A reply with NaN or an infinity, or one that the reducer cannot take, is left out and named.
    """

    def __init__(self, ask: Ask, quorum: float | int = 1) -> None:
        self.ask, self.needed, self.reducer = ask, ask.needed(quorum), ask.reducer
        self.acc = self.reducer.zero() if self.reducer else None
        self.each: dict[ClientId, Payload] = {}
        self.answered: list[ClientId] = []
        self.missing: dict[ClientId, str] = {}
        self.notes: dict[ClientId, Payload] = {}
        self.seconds: dict[ClientId, float] = {}

    @property
    def full(self) -> bool:
        """Whether so many answers count as close the ask."""
        return self.ask.enough is not None and len(self.answered) >= self.ask.enough

    def miss(self, client: ClientId, why: str) -> None:
        """This client gives no answer, or none that counts."""
        self.missing[client] = why

    def take(self, client: ClientId, reply: Payload, seconds: float | None = None) -> None:
        """One answer, and how long it took where the engine says so."""
        if bad := non_finite(reply):
            return self.miss(client, f"reply refused: '{bad}' holds NaN or infinity")
        if notes := part(reply, "note"):
            reply = {key: v for key, v in reply.items() if not key.startswith("note/")}
        try:
            if self.reducer:
                self.acc = self.reducer.add(self.acc, reply)
            else:
                self.each[client] = reply
        except (PayloadError, KeyError) as error:
            return self.miss(client, f"reply refused: {error}")
        self.answered.append(client)
        self.missing.pop(client, None)  # an earlier answer of its may have been refused
        if notes:
            self.notes[client] = notes
        if seconds is not None:
            self.seconds[client] = seconds

    def done(self) -> Replies:
        """Who answered what; raises QuorumError when too few did."""
        if len(self.answered) < self.needed:
            why = "; ".join(f"{cid}: {reason}" for cid, reason in list(self.missing.items())[:5])
            raise QuorumError(f"{self.ask.phase}: {len(self.answered)} of {len(self.ask.msgs)} clients answered, "
                              f"{self.needed} needed ({why})")
        value = self.reducer.done(self.acc) if self.reducer and self.answered else None
        return Replies(self.each, value, tuple(self.answered), self.missing, self.notes,
                       self.seconds)

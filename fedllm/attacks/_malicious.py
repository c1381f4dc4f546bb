"""What attacks share: who is malicious, when they act, and how a reply's change is read and replaced."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedllm.core.ask import Ask, Program
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer, name_of
from fedllm.core.payload import Payload, Tree
from fedllm.core.reduce import wide
from fedllm.core.rng import numpy_stream
from fedllm.local.requests import Fit, Losses, Sensitivity


@dataclass(frozen=True)
class Malicious(Knobs, Layer, ABC):
    """Makes chosen clients malicious in chosen rounds.

    The server half only marks their messages, so that an engine far away needs to know nothing else; the client half
    acts on the mark. List an attack above codecs, masks and noise: the attacker obeys the wire like everybody.
    """

    algebra = Algebra("attack", contracts=False)

    clients: float | int | str | tuple[str, ...] = knob(0.2, "who is malicious: a share (0.3), a count, or ids")
    start: int | None = knob(0, "first round (from 0) in which they attack", ge=0)
    end: int | None = knob(None, "last round in which they attack; None: to the end", ge=0)
    probability: float = knob(1.0, "probability that they attack in a round", gt=0, le=1)
    pick: int = knob(0, "seed of who they are, where `clients` is a number", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        who = self.clients
        if isinstance(who, str):
            object.__setattr__(self, "clients", (who,))
        elif isinstance(who, bool) or (isinstance(who, float) and not 0 <= who < 1) or (
                isinstance(who, int) and who < 0):
            raise RecipeError(f"{type(self).__name__}.clients = {who!r} is not allowed; it must be a share from 0 to "
                              "below 1, a count, or a list of ids")

    def bind(self, facts: Facts) -> Malicious:
        """The same with the ids of those who are malicious."""
        known = list(facts.rows)
        if isinstance(self.clients, tuple):
            for unknown in [c for c in self.clients if c not in known]:
                near = difflib.get_close_matches(str(unknown), known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise RecipeError(f"{type(self).__name__}.clients: no client '{unknown}' in this run{hint or '.'} "
                                  f"There are {', '.join(known[:12])}")
            return self
        count = round(self.clients * len(known)) if isinstance(self.clients, float) else self.clients
        if self.clients and not count:
            raise RecipeError(f"{type(self).__name__}.clients = {self.clients} is not allowed: of {len(known)} that is "
                              f"nobody, and nothing would be attacked; take a share above {0.5 / len(known):.3g}, a "
                              "count, ids, or 0")
        if count > len(known):  # type: ignore[operator]
            raise RecipeError(f"{type(self).__name__}.clients = {count} is not allowed: the run has {len(known)}")
        picks = numpy_stream(self.pick, "malicious").permutation(len(known))[:count]  # more attackers: those and others
        return replace(self, clients=tuple(known[i] for i in sorted(picks)))

    def init(self) -> dict[str, Any]:
        return {"asks": {}}

    @property
    def mark(self) -> str:
        """The key that tells a client to attack; its value is the round."""
        return f"_{type(self).__name__}/round"

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        if isinstance(ask.owner, Layer) or ask.reducer is None:
            return (yield ask)
        t = state["asks"][ask.phase] = state["asks"].get(ask.phase, -1) + 1
        mine = [c for c in ask.msgs if c in self.ids()] if self.active(t) else []
        if not mine:
            return (yield ask)
        told = {c: {**m, **self.tells(ask, mine, t)} if c in mine else m for c, m in ask.msgs.items()}
        return (yield from self.attacked(replace(ask, msgs=told), mine))

    def ids(self) -> tuple[str, ...]:
        """Who is malicious."""
        if not isinstance(self.clients, tuple):
            raise RecipeError(f"{name_of(self)}.clients = {self.clients} is a number: bind the layer first")
        return self.clients

    def active(self, t: int) -> bool:
        """Whether they attack in round t."""
        if t < (self.start or 0) or (self.end is not None and t > self.end):
            return False
        return self.probability == 1 or numpy_stream(self.pick, "attack", t).random() < self.probability

    def tells(self, ask: Ask, mine: Sequence[str], t: int) -> dict[str, Any]:
        """What malicious clients are told beside their message."""
        return {self.mark: t}

    def attacked(self, ask: Ask, mine: Sequence[str]) -> Program:
        """The ask, with the marks in place; those who collude meet here."""
        return (yield ask)

    def client(self, fn: Any, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        if self.mark not in msg:
            return call(msg)
        own = self.mark.partition("/")[0] + "/"
        plain = {k: v for k, v in msg.items() if not k.startswith(own)}
        return self.forge(plain, client, call, msg)

    @abstractmethod
    def forge(self, msg: Payload, client: Any, call: Callable[[Payload], Payload], marked: Payload) -> Payload:
        """A malicious client's reply; `marked` also holds what `tells` said."""


class Poisoner(Malicious, ABC):
    """Malicious clients that follow the protocol on rows that they have changed."""

    @abstractmethod
    def poison(self, rows: Sequence[Any], client: Any) -> list[Any]:
        """As many tokenized rows, some of them changed; those given stay as they are."""

    def poisoned(self, request: Any, client: Any) -> Any:
        """The same request on poisoned rows."""
        if not isinstance(request, Fit | Losses | Sensitivity):
            return request
        if client.model.task not in ("generation", "classification"):
            raise CompositionError(f"layer '{name_of(self)}' and data.task = {client.model.task!r} do not fit "
                                   "together: it poisons rows of the tasks generation and classification")
        if isinstance(request, Fit) and request.side:
            raise CompositionError(f"layer '{name_of(self)}' and objective '{request.objective.name}' do not fit "
                                   "together: labels that stand beside the rows would stay as they were, and the "
                                   "attack would seem to fail; use a method that learns from rows alone (fedavg)")
        return replace(request, rows=self.poison(request.rows, client))

    def forge(self, msg: Payload, client: Any, call: Callable[[Payload], Payload], marked: Payload) -> Payload:
        with client.through(lambda request: self.poisoned(request, client)):
            return call(msg)


def told_tensor(key: str, reply: Payload, msg: Payload) -> Tensor | None:
    """The tensor of the message that this entry of a reply starts from: of the same name, or None for a change."""
    told = msg.get(key)
    return told if isinstance(told, Tensor) and told.shape == reply[key].shape else None


def change_of(msg: Payload, reply: Payload) -> Tree:
    """What a client would change: its deltas as they are, and its weights less those that it was told."""
    out = {}
    for key, v in reply.items():
        if isinstance(v, Tensor) and v.is_floating_point():
            told = told_tensor(key, reply, msg)
            out[key] = wide(v) if told is None else wide(v) - wide(told)
    return out


def with_change(msg: Payload, reply: Payload, change: Tree) -> dict[str, Any]:
    """The reply with this change in the place of its own."""
    out = dict(reply)
    for key, u in change.items():
        told = told_tensor(key, reply, msg)
        out[key] = (u if told is None else wide(told) + u).to(reply[key].dtype)
    return out


def start_of(key: str, reply: Payload, msg: Payload) -> Tensor | None:
    """The weights that this entry is about: those told under its name, or `theta/x` for `delta/x`."""
    told = msg.get(key if key in msg else "theta/" + key.partition("/")[2])
    return told if isinstance(told, Tensor) and told.shape == reply[key].shape else None

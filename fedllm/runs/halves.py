"""Two engines for a run that is gone through again: one tells what was asked then, one asks now what is not known."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.core.ask import Ask, ClientId, Replies
from fedllm.core.payload import Payload, pack
from fedllm.core.program import Fold
from fedllm.runs.tape import Playback, Recorded
from fedllm.wire import codec

Memory = Callable[[ClientId, int], Mapping[str, Any]]


class Kept:
    """A reducer that folds nothing: every reply as it came."""

    ragged = True

    def zero(self) -> list[Payload]:
        return []

    def add(self, acc: list[Payload], reply: Payload) -> list[Payload]:
        acc.append(reply)
        return acc

    def done(self, acc: list[Payload]) -> Any:
        return acc


def told(ask: Ask, client: ClientId) -> tuple[str, str]:
    """What a client was asked, in short: equal only where the message is, bit for bit."""
    return ask.phase, hashlib.sha256(codec.encode(ask.msgs[client])).hexdigest()


class Then(Playback):
    """A tape that notes what each client was told in a round, and what it said or why it did not."""

    def __init__(self, folder: Path, quorum: float | int, home: Any) -> None:
        """`home` is an engine for what the server asks of itself, of which there is no tape."""
        super().__init__(folder, None, quorum)
        self.home = home
        self.asked: dict[ClientId, list[tuple[tuple[str, str], Payload | str]]] = {}

    def begin(self, round: int) -> None:
        super().begin(round)
        self.home.begin(round)
        self.asked = defaultdict(list)

    def end(self, counts: bool) -> None:
        """The round is over, and counted or not."""
        if counts:
            self.home.commit()
        else:
            self.home.abandon()

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        return [self.home.send([ask])[0] if ask.at_home else self._answer(replace(ask, opened=None)) for ask in asks]

    def _taped(self, ask: Ask) -> Recorded:
        tape = super()._taped(ask)
        for client in ask.msgs:
            self.asked[client].append((told(ask, client), tape.replies.get(client, tape.missing.get(client, "silent"))))
        return tape


class Now:
    """Answers from the tape while a client is told what it was told then, and asks it from there on.

    A client that differed once is asked ever after, with the memory that it had by then; what it was told before in
    the same round is asked again, for its scratch of the round.
    """

    def __init__(self, real: Any, quorum: float | int, memory: Memory, anew: Collection[ClientId]) -> None:
        """`anew` are asked from the start: they remember, and what they remembered before each round was not kept."""
        self.real, self.quorum, self.memory = real, quorum, memory
        self.anew = set(anew)
        self.taken = self.asked = 0
        self.begin(0, {})

    def begin(self, round: int, then: Mapping[ClientId, Sequence[tuple[tuple[str, str], Payload | str]]]) -> None:
        """A new round, in which clients were told and said this then."""
        self.round, self.then = round, then
        self.at: Counter[ClientId] = Counter()
        self.past: dict[ClientId, list[Ask]] = defaultdict(list)
        self.real.begin(round)

    def end(self, counts: tuple[bool, bool], but: ClientId) -> None:
        """The round is over; whether it counted then, and counts now. Who was told more then remembers otherwise."""
        for client in {*self.past, *self.then} - self.anew - {but}:
            if self.at[client] < len(self.then.get(client, ())) or counts[0] != counts[1]:
                self._differs(client)
        if counts[1]:
            self.real.commit()
        else:
            self.real.abandon()

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        known = [{} if ask.at_home else self._known(ask) for ask in asks]
        left = [replace(ask, msgs={c: m for c, m in ask.msgs.items() if c not in mine})
                for ask, mine in zip(asks, known, strict=True)]
        new = iter(self.real.send([a if a.at_home else replace(a, reduce=Kept(), quorum=0) for a in left if a.msgs]))
        outs = []
        for ask, mine, rest in zip(asks, known, left, strict=True):
            said = next(new) if rest.msgs else None
            outs.append(said if ask.at_home and said is not None else self._folded(ask, mine, said))
        return outs

    def _known(self, ask: Ask) -> dict[ClientId, Payload | str]:
        """What the tape has for this ask; whoever is told something else is asked from now on."""
        out = {}
        for client in ask.msgs:
            then, at = self.then.get(client, ()), self.at[client]
            if client not in self.anew and not (at < len(then) and then[at][0] == told(ask, client)):
                self._differs(client)
            if client not in self.anew:
                out[client] = then[at][1]
                self.past[client].append(ask)
            self.at[client] += 1
        return out

    def _differs(self, client: ClientId) -> None:
        """From here on this client is asked."""
        self.anew.add(client)
        if before := dict(self.memory(client, self.round)):
            self.real.memory[client] = before
        for ask in self.past.pop(client, ()):
            self.real.send([replace(ask, msgs={client: ask.msgs[client]}, reduce=Kept(), quorum=0)])

    def _folded(self, ask: Ask, mine: Mapping[ClientId, Payload | str], said: Replies | None) -> Replies:
        """The answers from both sides, in the order of the ask."""
        new = dict(zip(said.answered, said.value or (), strict=True)) if said is not None else {}  # type: ignore[call-overload]
        self.taken += sum(not isinstance(x, str) for x in mine.values())
        self.asked += len(new)
        fold = Fold(replace(ask, opened=None), self.quorum)
        for client in ask.msgs:
            if client in mine:
                reply = mine[client]
                fold.miss(client, reply) if isinstance(reply, str) else fold.take(client, reply)
            elif client in new:
                notes = said.notes.get(client) if said is not None else None
                fold.take(client, {**new[client], **(pack(note=notes) if notes else {})})
            else:
                fold.miss(client, said.missing.get(client, "silent") if said is not None else "silent")
        return fold.done()

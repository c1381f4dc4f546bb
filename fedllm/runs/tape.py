"""Keeps the replies of every round as bytes, and gives them to a server that runs again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.errors import CompositionError, RunError
from fedllm.core.layer import Layer, name_of
from fedllm.core.payload import Payload, pack
from fedllm.core.program import Fold
from fedllm.core.reduce import Mean, Reducer
from fedllm.runs.store import write_atomic
from fedllm.wire import codec


class Taped:
    """A reducer that writes each reply down once its own reducer has taken it."""

    def __init__(self, inner: Reducer, write: Callable[[Payload], int]) -> None:
        self.inner, self.write, self.ragged = inner, write, getattr(inner, "ragged", False)
        self.sizes: list[int] = []

    def zero(self) -> Any:
        return self.inner.zero()

    def add(self, acc: Any, reply: Payload) -> Any:
        acc = self.inner.add(acc, reply)  # one that it refuses is no answer, and is not kept
        self.sizes.append(self.write(reply))
        return acc

    def done(self, acc: Any) -> Payload:
        return self.inner.done(acc)


class Tape(Layer):
    """The lowest layer, at the server alone: every reply of a round goes to `replies/<round>.bin` as it arrives.

    `<round>.json` lists, for each ask in turn, its phase, who answered, and the size of each reply.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.round = folder, 0
        self.trouble = ""
        self._file: BinaryIO | None = None
        self._index: list[dict[str, Any]] = []
        folder.mkdir(exist_ok=True)

    def begin(self, round: int) -> None:
        """A new round, or the same one again."""
        self.close()
        self.round, self._index, self.trouble = round, [], ""
        try:
            self._file = (self.folder / f"{round:06d}.bin").open("wb")
        except OSError as error:
            self.trouble = error.strerror or str(error)

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        if self._file is None:
            return (yield ask)
        if ask.reducer is not None:
            taped = Taped(ask.reducer, self._write)
            out = yield replace(ask, reduce=taped)
            sizes = taped.sizes
        else:
            out = yield ask
            sizes = [self._write(reply) for reply in out.each.values()]
        beside = {c: codec.encode(pack(note=note)).hex() for c, note in out.notes.items()}
        self._index.append({"phase": ask.phase, "clients": list(out.folded), "sizes": sizes,
                            "missing": dict(out.missing), "notes": beside, "seconds": dict(out.seconds)})
        return out

    def _write(self, reply: Payload) -> int:
        """Append one reply and give its size; a full disk ends this round's tape, not the round."""
        data = codec.encode(reply)
        try:
            if self._file is not None and not self.trouble:
                self._file.write(data)
        except OSError as error:
            self.trouble = error.strerror or str(error)
        return len(data)

    def close(self) -> None:
        """End the round's files. An index is written only beside replies that are all there."""
        if self._file is None:
            return
        index = self.folder / f"{self.round:06d}.json"
        try:
            self._file.close()
            if not self.trouble:
                write_atomic(index, json.dumps(self._index).encode())
        except OSError as error:
            self.trouble = error.strerror or str(error)
        self._file = None


@dataclass
class Recorded:
    """What one ask was answered."""

    phase: str
    replies: Mapping[str, Payload]
    missing: Mapping[str, str]
    seconds: Mapping[str, float]


def recorded(folder: Path, round: int) -> Iterator[Recorded]:
    """The answers of one round, ask by ask."""
    try:
        index = json.loads((folder / f"{round:06d}.json").read_text())
        data = memoryview((folder / f"{round:06d}.bin").read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: the replies of round {round} cannot be read ({error}); a run keeps them with "
                       "record.replies=true") from None
    at = 0
    for one in index:
        replies = {}
        for client, size in zip(one["clients"], one["sizes"], strict=True):
            replies[client] = codec.decode(bytearray(data[at : at + size]))
            at += size
            if beside := one.get("notes", {}).get(client):
                replies[client] |= codec.decode(bytes.fromhex(beside))
        yield Recorded(one["phase"], replies, one["missing"], one.get("seconds", {}))


def check_taped(method: Any) -> None:
    """CompositionError for a method whose replies say nothing to anybody after their round."""
    marks = {n: getattr(getattr(type(method), n), "__dict__", {}) for n in dir(type(method))}
    if sealed := [n for n, mark in marks.items() if mark.get("sealed")]:
        raise CompositionError(f"method '{name_of(method)}': its clients seal letters to one another "
                               f"({sealed[0]}) with keys that nobody keeps, so its replies cannot be folded again")


class Playback:
    """An engine that answers from a tape: no client and no data. `reducer` takes the place of every plain mean."""

    def __init__(self, folder: Path, reducer: Reducer | None, quorum: float | int) -> None:
        self.folder, self.reducer, self.quorum = folder, reducer, quorum
        self._round: Iterator[Recorded] = iter(())

    def begin(self, round: int) -> None:
        """Rewind to this round."""
        self._round = recorded(self.folder, round)

    def send(self, asks: Sequence[Ask]) -> list[Replies]:
        return [self._answer(ask) for ask in asks]

    def _taped(self, ask: Ask) -> Recorded:
        """What this ask was answered; RunError where the tape goes on with another."""
        if ask.at_home:
            raise CompositionError(f"{ask.phase} is what the server asks of itself on public rows, of which a tape has "
                                   "nothing: this method cannot be replayed")
        tape = next(self._round, None)
        if tape is None or tape.phase != ask.phase:
            raise RunError(f"the tape has {tape.phase if tape else 'nothing more'} where the server asks {ask.phase}; "
                           "with another reducer this method asks other questions, so it cannot be replayed")
        return tape

    def _answer(self, ask: Ask) -> Replies:
        tape = self._taped(ask)
        if self.reducer is not None:
            if ask.reducer is not None and not isinstance(ask.reducer, Mean):
                raise CompositionError(f"{ask.phase} folds replies with {type(ask.reducer).__name__}, whose result "
                                       f"{type(self.reducer).__name__} cannot stand for; replay without --reducer")
            ask = replace(ask, reduce=self.reducer) if ask.reducer is not None else ask
        fold = Fold(ask, self.quorum)
        for client, why in tape.missing.items():
            fold.miss(client, why)
        for client, reply in tape.replies.items():
            fold.take(client, reply, tape.seconds.get(client))
        return fold.done()

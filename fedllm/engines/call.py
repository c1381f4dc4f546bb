"""A client during one call: whose rows and draws they are, and what its owner and its layers hold it to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import CompositionError, Withheld
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Row
from fedllm.engines.holder import Holder
from fedllm.engines.world import World
from fedllm.local.requests import Booked, Request
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.sealed import Sealed


class Session(dict[str, Any]):
    """A client's scratch of one round: handed from one of its functions to the next, gone when the round ends."""

    def __missing__(self, key: str) -> Any:
        raise Withheld(f"'{key}' is not in this round's scratch: nothing put it there, or another process did (a site "
                       "that was started again; engine ray, whose workers keep none)")


class Bounds:
    """What its owner holds a client to; in a simulation nothing."""

    def spend(self, release: Any, count: int) -> None:
        """So many noisy releases are about to be made."""

    def work(self, steps: int, tokens: int = 0) -> None:
        """So much work is about to be done."""


FREE = Bounds()


class Call(Holder):
    """One client during one call of one of its functions: its rows, its draws, and what layers see of it."""

    def __init__(self, info: ClientInfo, world: World, memory: MutableMapping[str, Any], round: int, phase: str,
                 visit: int, submit: Callable[[Request], Any], model: Model | None = None,
                 session: Session | None = None, bounds: Bounds = FREE) -> None:
        """`model` is the one that this client holds; None: the world's."""
        self._bounds = bounds
        self.id, self.n, self.profile, self.model = info.id, info.n, info.profile, model or world.model
        self.memory, self.round, self.session = memory, round, Session() if session is None else session
        self._world, self._submit = world, submit
        step = phase.rpartition(".")[2]  # the function, without whose it is: methods compare on the same batches
        self._key = (world.seed, round, info.id, step, visit)
        self._streams: dict[str, np.random.Generator] = {}
        self._closed, self._stepped = "", 0
        self._called, self.used = info.profile.model, {}

    @property
    def training(self) -> LocalSpec:
        """How the recipe has this client train in this round."""
        return self._local(self.n or sum(c.n for c in self._world.infos()))  # the server counts everybody's rows

    def _local(self, rows: int) -> LocalSpec:
        return self._world.local.at(self.round, self._world.rounds, rows, self._stepped)

    @property
    def pace(self) -> float | None:
        """Seconds of one local step here, as the fleet declares it; None where time is real."""
        fleet = self._world.fleet
        return fleet.compute(self.profile, 1.0) if fleet else None

    @contextlib.contextmanager
    def through(self, change: Callable[[Request], Request], closed: str = "",
                heard: Callable[[Any], None] = lambda answer: None) -> Iterator[None]:
        """For layers: `change` sees every request made inside, and changes or refuses it; `heard` is told each answer.

        `closed` says why the functions above may not read the rows themselves (empty: they may).
        """
        before = self._submit, self._closed

        def submit(request: Request) -> Any:
            answer = before[0](change(request))
            heard(answer)
            return answer

        self._submit, self._closed = submit, closed or self._closed
        try:
            yield
        finally:
            self._submit, self._closed = before

    def keep(self, payload: Mapping[str, Any]) -> None:
        """Raise where a payload that crosses the wire holds a tensor of a stream that is personal."""
        if self.id != SERVER and isinstance(self.model, Model | Sealed) and (found := self.model.withheld(payload)):
            raise CompositionError(f"stream '{found[1]}' is personal and cannot be put on the wire, where "
                                   f"'{self._key[3]}' puts it under '{found[0]}'; keep it in client.memory, or take it "
                                   "out of space.personal")

    def _open_rows(self) -> None:
        if self._closed:
            raise CompositionError(self._closed)

    def _encoded(self, part: str) -> list[Encoded]:
        return self._world.encoded(self.id, part, self.model)

    @property
    def data(self) -> Sequence[Mapping[str, Any]]:
        """The client's own training rows."""
        self._open_rows()
        return self._world.rows(self.id, "train")

    @property
    def tokens(self) -> Sequence[Encoded]:
        """The client's own training rows, tokenized."""
        self._open_rows()
        return self._encoded("train")

    @property
    def public(self) -> Sequence[Encoded]:
        """The federation's public rows, tokenized."""
        return self._encoded("public")

    def held_out(self, on: str = "local") -> Sequence[Mapping[str, Any]]:
        """The client's held-out rows, or those of the simulation's global test (`on="global"`)."""
        return self._world.rows(SERVER if on == "global" else self.id, "test")

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Rows as the model reads them."""
        return self._world.tokenized(rows, True, self.model)

    def rng(self, owner: str) -> np.random.Generator:
        """This owner's stream for the present round and phase."""
        if owner not in self._streams:
            self._streams[owner] = numpy_stream(*self._key, owner)
        return self._streams[owner]

    def spend(self, release: Any, count: int = 1) -> None:
        """For layers: so many noisy releases are about to leave; a real site books them, or refuses."""
        self._bounds.spend(release, count)

    def book(self, *, tokens: int, steps: float, flops: float = 0.0) -> None:
        """Count work that this function does by itself, before it does it: `steps` as local steps, of `fit`'s size."""
        self._bounds.work(math.ceil(steps), tokens)
        self._ask(Booked(self.id, self.model, {}, None, tokens, steps, flops))

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)` of a pure function, computed once for all clients of this process."""
        return self._world.once(fn, *args)

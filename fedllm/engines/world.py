"""What the clients of a simulation stand on: the model, their rows, how they train and how they are scored."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm.core.client import SERVER, ClientInfo, Fleet, Profile
from fedllm.core.errors import CompositionError, DataError, ModelError
from fedllm.core.method import Method
from fedllm.core.payload import digest, leaves
from fedllm.data.encode import Encoded, encode_rows
from fedllm.data.federation import Federation, Row
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.endpoint import Endpoint
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf

KEPT = 4
"""How many results of `once` are kept."""
KEPT_STREAMED = 512
"""How many clients' tokenized rows are kept where clients are streamed."""


@dataclass
class World:
    """Everything that a client call may reach, apart from its own memory."""

    model: Model
    federation: Federation
    local: LocalSpec = field(default_factory=LocalSpec)
    seed: int = 0
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    exact_match: bool = True
    """Whether scoring a generation task also generates and compares answers."""
    max_new_tokens: int = 32
    completion_only: bool = True
    rounds: int | None = None
    """How many rounds the run has, for learning rates that fall from round to round; None: no set end."""
    fleet: Fleet | None = None
    """With it, time in a simulation is virtual."""
    models: Shelf = field(default_factory=Shelf)
    """The recipe's models beside the main one, by name."""
    held: Shelf = field(default_factory=Shelf)
    """The models that clients hold in the place of the main one, as their profiles call them."""
    metric: str | Sequence[str] = "exact"
    """When a generated answer is right, or several such rules (`tasks/answers.py`)."""

    def __post_init__(self) -> None:
        self._encoded: dict[tuple[str, str, int], list[Encoded]] = {}
        self._reader: dict[int, int] = {}
        self._once: OrderedDict[str, Any] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], tuple[str, Any]] = OrderedDict()

    def infos(self) -> list[ClientInfo]:
        """The clients as the server knows them, in the federation's order."""
        known = self.profiles
        return [ClientInfo(c, len(s.train), known.get(c, Profile())) for c, s in self.federation.clients.items()]

    def rows(self, client: str, part: str) -> Sequence[Row]:
        """`part` is "train", "test" or "public" (which is the same for all); SERVER has the global test, and every
        client's training rows."""
        if part == "public":
            return self.federation.public
        if client == SERVER:
            return self.federation.test if part == "test" else self.federation.pooled()
        shard = self.federation.clients[client]
        return shard.train if part == "train" else shard.test

    def model_of(self, client: str, method: Any = None) -> Any:
        """The model that this client holds: the one it was dealt, or the server's own; `method` may keep some of it
        back (an emulator, a black box)."""
        if client == SERVER:
            return self.model
        name = profile.model if (profile := self.profiles.get(client)) else None
        mine = self.model if name is None else self.held[name]
        return mine if method is None else method.at_client(mine)

    def encoded(self, client: str, part: str, model: Any = None) -> list[Encoded]:
        """Tokenized rows as this model (None: the main one) reads them, made once for each tokenizer."""
        model = _reader(model or self.model)
        key = (client, part, id(model.tokenizer))
        if key not in self._encoded:
            rows = self.rows(client, part)
            if part == "train" and not rows:
                raise DataError(f"client '{client}' has no training rows; leave it out or give it at least one")
            self._encoded[key] = self.tokenized(rows, part == "test", model)
            if self.models or self.held:  # so that no model is given what another one reads
                self._reader.update((id(row), key[2]) for row in self._encoded[key])
            if self.federation.streamed and len(self._encoded) > KEPT_STREAMED:  # the oldest is not the global test
                for row in self._encoded.pop(next(k for k in self._encoded if k[0] != SERVER)):
                    self._reader.pop(id(row), None)
        return self._encoded[key]

    def tokenized(self, rows: Sequence[Row], answers: bool = False, model: Any = None) -> list[Encoded]:
        """Rows as the model (None: the main one) reads them; a model without a tokenizer has them so from the start
        (unless its task reads rows without one), and tokenized rows (of `client.public`) stay as they are,
        if they are that model's.

        With `answers` the response alone counts, whatever of a row is learned in training.
        """
        model = _reader(model or self.model)
        if (model.tokenizer is None and not model.rules.bare) or (rows and isinstance(rows[0], Encoded)):
            if any(self._reader.get(id(r), own := id(model.tokenizer)) != own for r in rows if self._reader):
                raise CompositionError(f"model '{model.name}' is given rows that were tokenized for another model; "
                                       "give it the rows themselves, or those of `client.holding(name)`")
            return model.read(rows)
        room = model.room
        return model.read(encode_rows(
            rows, model.tokenizer, model.task, min(self.local.max_length, room), answers or self.completion_only,
            model.images, every_turn=self.local.every_turn and not answers, whole=room if answers else None))

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, kept for the next caller with equal arguments (the last few results only)."""
        key = self._key_of(fn, args)
        if key not in self._once:
            self._once[key] = fn(*args)
        self._once.move_to_end(key)
        while len(self._once) > KEPT:
            self._once.popitem(last=False)
        return self._once[key]

    def _key_of(self, fn: Callable[..., Any], args: Sequence[Any]) -> str:
        """A digest of the call; the very same tensors, unchanged, are not hashed again."""
        named = {"fn": f"{fn.__module__}.{fn.__qualname__}", "args": {str(i): a for i, a in enumerate(args)}}
        same = tuple((p, id(v), v._version) if isinstance(v, Tensor) else (p, repr(v)) for p, v in leaves(named))
        if same not in self._seen:
            self._seen[same] = (digest(named), args)  # holding the arguments keeps their ids from being used again
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return self._seen[same][0]


def _reader(model: Any) -> Any:
    """The model itself; ModelError for an endpoint, which no row is tokenized for."""
    if isinstance(model, Endpoint):
        raise ModelError(f"{model.base_url} ('{model.model}') is an endpoint: it continues text (client.complete), and "
                         "rows can be neither trained on nor scored there")
    return model


def method_on(stack: Sequence[Any]) -> Method | None:
    """The method of a stack, which has layers under it."""
    return next((part for part in stack if isinstance(part, Method)), None)

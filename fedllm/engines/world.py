"""What the clients of a simulation stand on: the model, their rows, how they train and how they are scored."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm.core.client import SERVER, ClientInfo, Fleet, Profile
from fedllm.core.errors import DataError
from fedllm.core.method import Method
from fedllm.core.payload import digest, leaves
from fedllm.data.encode import Encoded, encode_rows
from fedllm.data.federation import Federation, Row
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model

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

    def __post_init__(self) -> None:
        self._encoded: dict[tuple[str, str], list[Encoded]] = {}
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

    def encoded(self, client: str, part: str) -> list[Encoded]:
        """Tokenized rows, made once."""
        key = (client, part)
        if key not in self._encoded:
            rows = self.rows(client, part)
            if part == "train" and not rows:
                raise DataError(f"client '{client}' has no training rows; leave it out or give it at least one")
            self._encoded[key] = self.tokenized(rows, answers=part == "test")
            if self.federation.streamed and len(self._encoded) > KEPT_STREAMED:  # the oldest is not the global test
                del self._encoded[next(k for k in self._encoded if k[0] != SERVER)]
        return self._encoded[key]

    def tokenized(self, rows: Sequence[Row], answers: bool = False) -> list[Encoded]:
        """Rows as the model reads them; a model without a tokenizer has them so from the start, and tokenized rows
        (of `client.public`) stay as they are.

        With `answers` the response alone counts, whatever of a row is learned in training.
        """
        if self.model.tokenizer is None or (rows and isinstance(rows[0], Encoded)):
            return self.model.read(rows)  # type: ignore[arg-type]
        return self.model.read(encode_rows(rows, self.model.tokenizer, self.model.task, self.local.max_length,
                                           answers or self.completion_only, self.model.images))

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


def held_by(client: str, stack: Sequence[Any], model: Model) -> Model:
    """The model that this client holds: the server's own, unless the method on this stack keeps something back."""
    method = next((part for part in stack if isinstance(part, Method)), None)
    return model if client == SERVER or method is None else method.at_client(model)

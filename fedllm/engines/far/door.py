"""What may come in: oversized, malformed and misshapen payloads are refused before anyone computes with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload, non_finite, tensor_bytes
from fedllm.wire import codec

ROOM = 64 << 20
"""Bytes that any payload may have beside the trainables."""


@dataclass(frozen=True)
class Door:
    """Checks payloads against the model's trainables and against what the client was told."""

    most: int
    """Bytes of the largest payload let in."""
    names: frozenset[str] = field(default_factory=frozenset)
    """Names of the trainables; empty when layers may have recoded them."""

    @classmethod
    def of(cls, model: Any, coded: bool) -> Door:
        """The most is 64 MiB and four times the trainables; `coded`: layers name and shape replies as they like."""
        theta = model.initial()
        return cls(ROOM + 4 * tensor_bytes(theta), frozenset() if coded else frozenset(theta))

    def room(self, msg: Payload) -> int:
        """Bytes that an answer to `msg` may have."""
        return max(self.most, 4 * tensor_bytes(msg))

    def enter(self, msg: Payload, body: bytes | bytearray | memoryview) -> dict[str, Any]:
        """The payload in `body`, answering `msg`; raises PayloadError with the reason when it is refused."""
        if len(body) > (most := self.room(msg)):
            raise PayloadError(f"{len(body)} bytes, allowed are {most}")
        if not len(body):
            return {}
        reply = codec.decode(body)
        if bad := non_finite(reply):
            raise PayloadError(f"'{bad}' holds NaN or infinity")
        if self.names:
            self._shapes(msg, reply)
        return reply

    def _shapes(self, msg: Payload, reply: Payload) -> None:
        """A tree over the trainables has their names alone, and the shapes that this client was sent."""
        trees: dict[str, set[str]] = {}
        for key, v in reply.items():
            head, slash, tail = key.partition("/")
            if isinstance(v, Tensor) and slash:
                trees.setdefault(head, set()).add(tail)
        sent = {key.partition("/")[2]: v.shape for key, v in msg.items() if isinstance(v, Tensor) and "/" in key}
        for head, tails in trees.items():
            known = tails & self.names
            if known and (odd := sorted(tails - self.names)):
                raise PayloadError(f"'{head}/{odd[0]}' is not the name of a trainable")
            for tail in known & sent.keys():
                if reply[f"{head}/{tail}"].shape != sent[tail]:
                    raise PayloadError(f"'{head}/{tail}' has shape {tuple(reply[f'{head}/{tail}'].shape)}, "
                                       f"sent was {tuple(sent[tail])}")

"""What may come in: oversized and malformed payloads are refused before anyone computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload, non_finite, tensor_bytes
from fedllm.wire import codec

ROOM = 64 << 20
"""Bytes that any payload may have beside the trainables."""


@dataclass(frozen=True)
class Door:
    """Checks payloads before they are read; what they hold is for the form of their question (`core/form.py`)."""

    most: int
    """Bytes of the largest payload let in."""

    @classmethod
    def of(cls, model: Any) -> Door:
        """The most is 64 MiB and four times the trainables."""
        return cls(ROOM + 4 * tensor_bytes(model.initial()))

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
        return reply

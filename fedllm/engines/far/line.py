"""The line to a site as an engine sees it: what is waited for, how long, and how it falls silent."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedllm.core.errors import FedLLMError

Head = Mapping[str, Any]
"""The envelope of a message: small, JSON; the body is a payload in the codec's bytes, or empty."""

Body = bytes | bytearray | memoryview
"""A payload in the codec's bytes, or empty."""


class Silence(FedLLMError):
    """A site gives no answer; the message is the reason that the record keeps."""


class Barred(Silence):
    """Nobody may talk to this site: it was suspended, or struck off."""


class Unsent(Silence):
    """The question never left: there was no sign of life."""


class Link(Protocol):
    """Carries one message to one site and its answer back."""

    def call(self, site: str, head: Head, body: Body, seconds: float,
             over: threading.Event | None = None) -> tuple[Head, Body]:
        """The site's answer; raises `Silence` when there is none within `seconds`, or once `over` is set."""
        ...

    def revive(self, site: str) -> None:
        """Ask for a site's lost process to be started again; comes back at once."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long the server waits for what, in seconds."""

    answer: float = 3600.0
    """For an ask that names no deadline."""
    opening: float = 600.0
    """For a site to load its model."""
    probe: float = 3.0
    """For a sign of life."""
    every: float = 5.0
    """From one sign of life to the next while an answer is awaited."""
    grace: float = 60.0
    """How long a site may be gone in the middle of a call before the call is given up."""
    revive: float = 20.0
    """From one request to start a lost process again to the next."""
    stalled: float = 6 * 3600.0
    """Without any event of the run, after which its coordinator's process counts as hung."""

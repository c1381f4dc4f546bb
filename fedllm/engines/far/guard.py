"""What a site holds every answer to, whatever the coordinator says: nothing here; `federation.guard` is a site's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.layer import Layer
from fedllm.core.payload import Payload
from fedllm.engines.call import Bounds
from fedllm.engines.far.leaving import Words
from fedllm.engines.far.line import Body


@dataclass(frozen=True)
class Question:
    """One ask as the site sees it."""

    round: int
    phase: str
    visit: int
    test: bool
    """Whether it scores on held-out rows where no layer stands."""
    own: bool
    """Whether it is the method's own, or a layer's that reads rows; other questions of layers are part of one."""
    repeats: int
    """How often a round asks this, at the most."""


class Guard(Bounds):
    """Stands beside a site's run. Each of these may raise `Refused`; here none does."""

    def begin(self, question: Question, body: Body) -> None:
        """Before anything is computed."""

    def reply(self, reply: Payload, words: Words, sealed: bool, tells: Sequence[str]) -> None:
        """Before a reply leaves, as it will cross."""

    def content(self, reply: Payload, words: Words, sealed: bool) -> None:
        """What the method's own function gives, before any layer codes or masks it."""

    def go_on(self) -> None:
        """Before each training step."""

    def end(self) -> None:
        """After the work, whether it was of use or not."""


class Gate(Layer):
    """Next to the method: shows what its function gives, before layers code or mask it, to whoever holds the gate."""

    def __init__(self, look: Callable[[Payload], None]) -> None:
        self.look = look

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        reply = call(msg)
        self.look(reply)
        return reply

"""Switches that torch has once for the whole process, set by each thread for what it computes.

A site trains, answers and examines on threads of its own. Threads that want the same go together, and who wants
something else waits until they have left: a switch that another thread turned meanwhile would change the numbers of a
step, and one that is put back out of turn would stay turned.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


ONEDNN, PLAIN_ATTENTION = "products by oneDNN", "plain attention"
SWITCHES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    ONEDNN: _onednn, PLAIN_ATTENTION: lambda: sdpa_kernel(SDPBackend.MATH)}


class _Turned:
    """Which switches are turned on now, and how many threads compute under them."""

    def __init__(self) -> None:
        self._turn, self._waiting = threading.Condition(), deque[object]()
        self._now: frozenset[str] = frozenset()
        self._inside, self._undo = 0, contextlib.ExitStack()
        self._mine = threading.local()

    @contextlib.contextmanager
    def on(self, *wanted: str) -> Iterator[None]:
        held: frozenset[str] | None = getattr(self._mine, "held", None)
        want = frozenset(wanted) | (held or frozenset())
        if want == held:
            yield
            return
        self._leave()
        self._enter(want)
        try:
            yield
        finally:
            self._leave()
            if held is not None:
                self._enter(held)

    def now(self, switch: str) -> bool:
        return switch in self._now

    def _enter(self, want: frozenset[str]) -> None:
        """In turn, so that nobody is passed over for ever; waits holding nothing."""
        with self._turn:
            me = object()
            self._waiting.append(me)
            try:
                self._turn.wait_for(lambda: self._waiting[0] is me and (not self._inside or self._now == want))
            finally:
                self._waiting.remove(me)
                self._turn.notify_all()
            if not self._inside:
                for switch in sorted(want):
                    self._undo.enter_context(SWITCHES[switch]())
                self._now = want
            self._inside, self._mine.held = self._inside + 1, want

    def _leave(self) -> None:
        if getattr(self._mine, "held", None) is None:
            return
        with self._turn:
            self._mine.held, self._inside = None, self._inside - 1
            if not self._inside:
                self._undo.close()
                self._now = frozenset()
            self._turn.notify_all()


_TURNED = _Turned()


def on(*wanted: str) -> AbstractContextManager[None]:
    """Compute with these switches on, beside those that this thread has on already, and all others off."""
    return _TURNED.on(*wanted)


def on_now(switch: str) -> bool:
    """Whether it is on for who computes now; true for the threads too that autograd keeps for a card."""
    return _TURNED.now(switch)

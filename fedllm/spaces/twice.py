"""Kernels of our own know one derivative: where two are wanted, the modules' own forms run in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from fedllm.core.switches import PLAIN_ATTENTION, on

_WANTED: ContextVar[bool] = ContextVar("two derivatives are wanted", default=False)


def wanted() -> bool:
    """Whether what runs now will be differentiated twice."""
    return _WANTED.get()


@contextlib.contextmanager
def twice() -> Iterator[None]:
    """Inside, a forward can be differentiated twice: our kernels keep what they computed as numbers, through which no
    second derivative goes, and of torch's attention the plain one alone has any."""
    token = _WANTED.set(True)
    try:
        with on(PLAIN_ATTENTION):
            yield
    finally:
        _WANTED.reset(token)

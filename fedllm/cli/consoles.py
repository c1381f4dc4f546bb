"""What a process gets from whoever starts it: three streams, of which some may be closed or full, and signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""How schedulers and closed terminals end a program."""


def stand_open() -> None:
    """Streams that were closed lead nowhere, and those that lack a character show another one.

    The first three numbers of files are taken in any case: else a run's record would get one of them, and with it what
    libraries write to the console.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            while (got := os.open(os.devnull, os.O_RDWR)) < number:
                continue
            if got > number:
                os.close(got)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # one that takes nothing: said when something is written
                stream.reconfigure(errors="replace")


def leads_nowhere(stream: str = "stdout") -> None:
    """What is still to be written to this stream goes nowhere: its reader has gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, stream).fileno())


def flushed() -> None:
    """Write what waits; an OSError where standard output does not take it (Python would say so after all is over)."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def in_a_folder() -> bool:
    """Whether the folder in which this process works is still there."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def takes_nothing() -> bool:
    """Whether standard output refuses what is written."""
    try:
        sys.stdout.write("\n")
        flushed()
    except OSError:
        return True
    return False


@contextlib.contextmanager
def told_to_end() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGHUP end work as Ctrl-C does; the list that comes holds which of them came.

    Signals that are ignored (`nohup`) or handled stay so.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    owner = os.getpid()

    def ends(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked ends as it would
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        told.append(number)
        raise KeyboardInterrupt

    old = {n: signal.signal(n, ends) for n in ENDING if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

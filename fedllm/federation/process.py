"""Processes begun and ended as one tree: nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import psutil


def end_tree(pid: int, patience: float = 10.0) -> None:
    """End a process and all that it started: asked first, then killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        all_of = [*top.children(recursive=True), top]
        for process in all_of:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(all_of, patience)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no child is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

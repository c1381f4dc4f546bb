"""Processes begun and ended as one tree: nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from fedllm.core.errors import RunError

_GIVEN: set[int] = set()
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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


def need_port(port: int, what: str) -> None:
    """RunError at once when something on this machine listens at the port already."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a moment ago is no hindrance
        try:
            trial.bind(("", port))
        except OSError as error:
            raise RunError(f"port {port} of this machine cannot be had for {what} ({error.strerror}): end what uses "
                           "it, or make keys for another port") from None


def free_port() -> int:
    """A port of this machine for a server that begins later, in a process that cannot be handed a socket.

    It lies below those that the kernel gives to whoever asks for any: one of these may be somebody's by then. None is
    given twice by a process.
    """
    low, chance = 10_000, random.SystemRandom()  # a recipe's seed must not give two processes the same
    high = _ephemeral()
    for _ in range(1000):
        port = chance.randrange(low, high) if high - low > 1000 else 0
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
            port = int(trial.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port
    raise RunError("of a thousand ports of this machine none is free")


def _ephemeral() -> int:
    """The first port that the kernel gives to whoever asks for any."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


@contextlib.contextmanager
def no_proxy(*hosts: str) -> Iterator[None]:
    """Proxies in the environment are not for this machine, nor for these hosts: children find that there too."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    for name, value in before.items():
        have = [x for x in (value or "").split(",") if x]
        os.environ[name] = ",".join([*have, *(h for h in (*LOOPBACK, *hosts) if h not in have)])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

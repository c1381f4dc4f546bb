"""Sites that are processes of this machine: each answers on a socket in a folder that only its owner may enter.

A message is two lengths, a JSON envelope and a payload in the codec's bytes; nothing that comes is unpickled. A killed
process is a site that is silent, and stays one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import Body, Head, Silence, Sites

LENGTHS = struct.Struct("<IQ")
ENVELOPE, MOST = 1 << 24, 1 << 34
"""Bytes of the longest envelope, and of the longest body."""
LOOK = 0.1
"""Seconds between two looks at whether an answer is still wanted."""
START = 120.0
"""Seconds that a process has to load its model."""


class Near:
    """A link to the processes that this object starts; they end with it."""

    def __init__(self, make: Callable[[str], SiteHost], names: Sequence[str]) -> None:
        """`make` builds a site by its name; it goes to the processes, so it is a function of a module (or a
        `functools.partial` of one)."""
        self.folder, context = tempfile.mkdtemp(prefix="fedllm-"), multiprocessing.get_context("spawn")
        self.processes: Mapping[str, Any] = {name: context.Process(
            target=serve, args=(make, name, self.path(i)), daemon=True, name=f"fedllm-{name}")
            for i, name in enumerate(names)}
        self._paths = {name: self.path(i) for i, name in enumerate(names)}
        for process in self.processes.values():
            process.start()

    def __enter__(self) -> Near:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def path(self, number: int) -> str:
        """Of a site's socket."""
        return str(Path(self.folder) / str(number))

    def end(self) -> None:
        """No process is left."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def meet(self, sites: Sites, seconds: float = START) -> None:
        """Wait until every site has given a sign of life; RunError for one that gives none."""
        ends = time.monotonic() + seconds
        for name, site in sites.table.items():
            while (boot := sites.probe(name)) is None:
                if not self.processes[name].is_alive():
                    raise RunError(f"the process of '{name}' ended with {self.processes[name].exitcode} as it began")
                if time.monotonic() > ends:
                    raise RunError(f"'{name}' gave no sign of life in {seconds:g} s")
                time.sleep(LOOK)
            site.boot = boot

    def call(self, site: str, head: Head, body: Body, seconds: float, over: threading.Event | None = None
             ) -> tuple[Head, Body]:
        """As `Link` has it."""
        ends = time.monotonic() + seconds
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(max(LOOK, seconds))
                line.connect(self._paths[site])
                put(line, head, body)
                line.settimeout(LOOK)
                return take(line, lambda: time.monotonic() < ends and not (over is not None and over.is_set()))
        except (OSError, EOFError) as error:
            raise Silence(f"its process does not answer ({type(error).__name__})") from None

    def revive(self, site: str) -> None:
        """Who is gone stays away."""


def serve(make: Callable[[str], SiteHost], name: str, path: str) -> None:
    """One site's process: every call is answered by a thread of its own."""
    host = make(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            line, _ = listener.accept()
            threading.Thread(target=_answer, args=(host, line), daemon=True).start()


def _answer(host: SiteHost, line: socket.socket) -> None:
    with line, contextlib.suppress(OSError, EOFError, ValueError):
        line.settimeout(START)
        put(line, *host.answer(*take(line, lambda: True)))


def put(line: socket.socket, head: Head, body: Body) -> None:
    """One message. Nothing is sent behind its last byte: who has it whole may have answered and closed by then."""
    said = json.dumps(dict(head)).encode()
    line.sendall(LENGTHS.pack(len(said), len(body)) + said)
    if len(body):
        line.sendall(body)


def take(line: socket.socket, go_on: Callable[[], bool]) -> tuple[dict[str, Any], bytearray]:
    """One message; EOFError where it breaks off, is too long, or nobody waits for it any longer."""
    heads, bodies = LENGTHS.unpack(_some(line, LENGTHS.size, go_on))
    if heads > ENVELOPE or bodies > MOST:
        raise EOFError(f"a message of {heads} and {bodies} bytes; allowed are {ENVELOPE} and {MOST}")
    return json.loads(bytes(_some(line, heads, go_on))), _some(line, bodies, go_on)


def _some(line: socket.socket, size: int, go_on: Callable[[], bool]) -> bytearray:
    out = bytearray()
    while len(out) < size:
        if not go_on():
            raise EOFError("nobody waits any longer")
        with contextlib.suppress(TimeoutError):
            if not (more := line.recv(min(size - len(out), 1 << 20))):
                raise EOFError("the line broke off")
            out += more
    return out

"""What `join` says of its site while processes of its own do the work: connected, asked, answered, refused, waiting."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.core.record import TESTS

log = logging.getLogger("fedllm.progress")
FILE = "progress.jsonl"
"""In the kit: what the site's process told, a line each. It never leaves."""
PROBE, GONE = 10.0, 2
"""Seconds between two looks whether an idle site's coordinator is there, and looks in vain after which it is gone."""
SILENT = 20.0
"""Seconds without a connection between two lines that say so."""


class Teller:
    """The process's end: appends what happens."""

    def __init__(self, kit: Path) -> None:
        self.path = kit / FILE

    def __call__(self, what: str, **fields: Any) -> None:
        """Note one thing; a disk that is full takes no answer from the run."""
        with contextlib.suppress(OSError), open(self.path, "a", opener=_mine) as file:
            file.write(json.dumps({"what": what, **fields}) + "\n")


def _mine(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class SiteWatch:
    """`join`'s end: says what is new."""

    def __init__(self, kit: Path, address: str, logs: str, connected: str) -> None:
        """`connected` is what stands in the kit's file `logs` once the coordinator has let the site in."""
        self.file, self.logs, self.mark, self.address = kit / FILE, kit / logs, connected.encode(), address
        with open(self.file, "w", opener=_mine):
            pass
        self.at, self.idle, self.missed = 0, False, 0
        self.begin()

    def begin(self) -> None:
        """The site's processes start."""
        self.seen = self.logs.stat().st_size if self.logs.exists() else 0
        self.connected, self.said, self.looked = False, time.monotonic(), time.monotonic()

    def look(self) -> None:
        """Say what happened since the last look."""
        if not self.connected and self.logs.exists():
            with self.logs.open("rb") as file:
                file.seek(max(0, self.seen - len(self.mark)))
                text = file.read()
            self.seen += max(0, len(text) - len(self.mark))
            if self.mark in text:
                self.connected = True
                self._say(f"connected to {self.address}; waiting for a run")
            elif time.monotonic() - self.said > SILENT:
                self._say(f"not connected to {self.address} yet ({self.logs} says more)")
        with self.file.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.at += len(line)
                said = json.loads(line)
                self.idle = said["what"] in ("closed", "refused") and said.get("op") != "ask"
                self._say(sentence(said))

    @property
    def alone(self) -> bool:
        """Whether no run is open here and the coordinator is gone: what stays would fill its log in vain."""
        if not self.idle or time.monotonic() - self.looked < PROBE:
            return False
        self.looked = time.monotonic()
        self.missed = 0 if there(self.address) else self.missed + 1
        return self.missed >= GONE

    def wait(self, stop: Callable[[], bool]) -> None:
        """Until the coordinator is there again, in silence."""
        self._say(f"the coordinator has gone; waiting for it at {self.address}")
        while not stop() and not there(self.address):
            time.sleep(2.0)
        self.missed, self.idle = 0, False

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        log.info("%s", text)


def there(address: str) -> bool:
    """Whether anybody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3.0).close()
    except OSError:
        return False
    return True


def sentence(said: dict[str, Any]) -> str:
    """One thing that happened, in words for whoever runs the site."""
    at, test = said.get("round"), str(said.get("phase")).rpartition(".")[2] in TESTS
    round = f"test after round {at}: " if test else f"round {at + 1}: " if isinstance(at, int) else ""
    texts = {"opened": lambda: f"run {said['run']} is open: {said['method']}, {said['rounds']} rounds, "
                               f"{said['rows']} rows of this site",
             "asked": lambda: f"{round}asked for {said['phase']}",
             "answered": lambda: f"{round}answered {said['phase']} in {said['seconds']:.1f} s, {said['bytes']:,} bytes",
             "refused": lambda: f"{round}refused {said.get('phase') or said.get('op')}: {said['why']}",
             "closed": lambda: "the run is over; waiting for the next"}
    return texts[said["what"]]()

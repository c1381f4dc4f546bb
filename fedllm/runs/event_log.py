"""The record of a run on disk: one event a line, each chained to the one before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from fedllm.core.errors import RunError
from fedllm.core.record import Event

CHAIN = ',"chain":"'
"""Before the last key of each event line: sha256 of the hash of the line before it and of this line without the key."""


def link(before: str, body: str) -> str:
    """The hash of a line, given that of the line before it ("" at the start)."""
    return hashlib.sha256((before + body).encode()).hexdigest()


class EventLog:
    """The append-only `events.jsonl`, each line chained to the one before it, so that `fedllm audit verify` sees what
    was changed later. On a full disk events wait in memory until they can be written."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Go on from byte `length`; what lies behind it belongs to work that is done again, and is cut."""
        self.path, self.trouble = path, ""
        self.waiting: list[str] = []
        self.length, self.head, self.count = length, "", 0
        path.touch(0o600)
        if path.stat().st_size < length:  # cutting it to a length that it does not have would pad it with NUL
            raise RunError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, and the last checkpoint was made "
                           f"at {length:,}; bring it back from a copy, or run the recipe again")
        os.truncate(path, length)
        with path.open("rb") as file:
            for line in file:  # the chain goes on from the last line that stands
                self.count += 1
                if b"\0" in line or not line.startswith(b"{"):
                    raise RunError(f"{path} is damaged on line {self.count}, as after a power cut; bring it back from "
                                   "a copy, or run the recipe again")
                self.head = line.decode(errors="replace").rpartition(CHAIN)[2].strip().strip('"}')
        self._file = path.open("ab", buffering=0)

    def append(self, event: Event) -> None:
        """Write one event as one line."""
        body = json.dumps(event, separators=(",", ":"), default=str)
        self.head = link(self.head, body)
        self.count += 1
        self.waiting.append(f'{body[:-1]}{CHAIN}{self.head}"}}\n')
        if len(self.waiting) >= 64 or event["kind"] != "wire":
            self.flush()

    def flush(self) -> bool:
        """Write what waits; False when the disk does not take it."""
        data = "".join(self.waiting).encode()
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.trouble = error.strerror or str(error)
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.length)  # half a line would break the file
            return False
        self.length += len(data)
        self.waiting, self.trouble = [], ""
        return True

    def sync(self) -> int:
        """Force all events to disk and give the file's length; raises OSError when that fails."""
        if not self.flush():
            raise OSError(0, self.trouble)
        os.fsync(self._file.fileno())
        return self.length

    def close(self) -> None:
        """Write the rest, if the disk takes it."""
        self.flush()
        self._file.close()

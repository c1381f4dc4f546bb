"""Follows a run's `events.jsonl` while it grows: each look reads only what is new."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PIECE, MOST = 1 << 22, 8
"""Bytes of one read, and reads in one look: a record of 100 MB is shown after a few looks, and none blocks the page."""
LONGEST = 1 << 24
"""Bytes after which a line that has no end is taken for damage."""
MARK = 96
"""Bytes before the place reached (the end of a line's hash): other bytes there mean that the file was cut and grew."""


class Odd(Exception):
    """Why a file cannot be shown."""


def plain_file(path: Path) -> IO[bytes]:
    """The file, open; Odd for what is none: a link or a pipe in a folder that came from elsewhere is not followed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Odd(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Odd(f"{path.name} is no plain file")
    return os.fdopen(handle, "rb")


def read_small(path: Path, most: int = 1 << 25) -> bytes:
    """The whole of a file that is not expected to be large."""
    with plain_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Odd(f"{path.name} has more than {most:,} bytes and is not shown")
    return data


class Tail:
    """Where one record was read to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin()

    def begin(self) -> None:
        """From the first byte."""
        self.at, self.size, self.lines, self.mark = 0, 0, 0, b""

    @property
    def behind(self) -> int:
        """Bytes that are there and not read yet; half a last line counts."""
        return self.size - self.at

    def look(self) -> Iterator[dict[str, Any] | None]:
        """The events written since the last look; None first where the record was cut, so that all comes afresh.

        Half a last line is left for the next look. Odd for a record that is damaged, or none.
        """
        with plain_file(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            file.seek(max(0, self.at - MARK))
            if self.size < self.at or file.read(min(MARK, self.at)) != self.mark:
                self.begin()
                self.size = os.fstat(file.fileno()).st_size
                yield None
            for _ in range(MOST):
                file.seek(self.at)
                piece = file.read(PIECE)
                if len(piece) == PIECE and b"\n" not in piece:
                    piece += file.read(LONGEST - PIECE)
                    if b"\n" not in piece and len(piece) == LONGEST:
                        raise Odd(f"{self.path.name} is damaged: line {self.lines + 1} has no end")
                whole = piece[: piece.rfind(b"\n") + 1]
                if not whole:
                    return
                yield from self._events(whole)
                self.mark = (self.mark + whole)[-MARK:]

    def _events(self, whole: bytes) -> Iterator[dict[str, Any]]:
        for line in whole[:-1].split(b"\n"):
            self.lines += 1
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict):
                raise Odd(f"{self.path.name} is damaged on line {self.lines}; `fedllm audit verify` says more")
            self.at += len(line) + 1
            yield event

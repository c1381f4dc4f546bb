"""How many rows a process may hold: what is read whole must fit into the machine, and is refused before it does not."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from fedllm.core.errors import DataError

CGROUP = Path("/sys/fs/cgroup/memory.max")
ROW, TIMES = 800, 3
"""Bytes that a row takes as an object of Python beside its text, and how often its text is held (read, shaped)."""


@functools.cache
def memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return min(whole, int(told)) if told.isdigit() else whole


class Held:
    """Counts the rows of one source as they are read, over all of its files."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: bytes that they may take, half of the memory by default (the model wants some, too)."""
        self.most = memory() // 2 if most is None else most
        self.rows = self.text = 0

    def takes(self, path: Path, text: int) -> None:
        """One more row with so many characters; a DataError where there is no more room."""
        self.rows, self.text = self.rows + 1, self.text + text
        if self.rows * ROW + self.text * TIMES > self.most:
            raise DataError(f"{path}: after {self.rows:,} rows with {self.text:,} characters the rows of data.source "
                            f"(or test, or public) would take more than half of this machine's memory "
                            f"({self.most:,} bytes); take fewer files, or group them on disk with `fedllm group` and "
                            "read them as data.source: grouped:FOLDER", file=str(path), kind="unreadable")

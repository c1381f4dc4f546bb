"""What a run costs on this machine: seconds, peak memory, and joules where it counts them."""

from __future__ import annotations

import contextlib
import re
import resource
import time
from pathlib import Path

import torch

from fedllm.local import power

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Counts from the moment it is made; a resumed run goes on from what it had spent."""

    def __init__(self, seconds: float = 0.0, peak: int = 0, joules: float | None = None) -> None:
        self._seconds, self._peak, self._joules, self._start = seconds, peak, joules, time.perf_counter()
        self._energy = power.read()
        with contextlib.suppress(OSError):
            REFS.write_text("5")  # the kernel's high-water mark starts again from what is held now
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def seconds(self) -> float:
        """Wall-clock time."""
        return self._seconds + time.perf_counter() - self._start

    def peak(self) -> int:
        """Highest resident memory in bytes, the accelerator's added."""
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return max(self._peak, _high_water() + gpu)

    def joules(self) -> float | None:
        """Energy of processor packages and cards, or None where the machine does not tell."""
        spent = power.read().since(self._energy)
        return self._joules if spent is None else (self._joules or 0.0) + spent

    def joules_from(self) -> str:
        """What counts them, or why nothing does."""
        return self._energy.sources


def _high_water() -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

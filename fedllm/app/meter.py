"""What a run costs on this machine: seconds, peak memory, and joules where the processor counts them."""

from __future__ import annotations

import contextlib
import re
import resource
import time
from pathlib import Path

import torch

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Meter:
    """Counts from the moment it is made; a resumed run goes on from what it had spent."""

    def __init__(self, seconds: float = 0.0, peak: int = 0, joules: float | None = None) -> None:
        self._seconds, self._peak, self._joules, self._start = seconds, peak, joules, time.perf_counter()
        self._energy = _microjoules()
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
        """Energy of the processor package, or None where the machine does not tell."""
        now = _microjoules()
        if now is None or self._energy is None or now < self._energy:  # the counter wraps around after a while
            return self._joules
        return (self._joules or 0.0) + (now - self._energy) / 1e6


def _high_water() -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _microjoules() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(ENERGY.read_text())
    return None

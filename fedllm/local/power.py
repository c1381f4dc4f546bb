"""Joules that the machine counts itself: RAPL for processor packages (Linux powercap) and NVML for NVIDIA cards.

Both are counters, so that nothing needs to be sampled while work is done. What cannot be read is said, never guessed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Counters:
    """Joules of each source since some moment of its own, where a counter starts again (None: never seen to), and why
    sources are missing."""

    joules: Mapping[str, float] = field(default_factory=dict)
    wraps: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def sources(self) -> str:
        """For example `RAPL intel-rapl:0`, or why there is none."""
        return ", ".join(self.joules) if self.joules else "not measured: " + "; ".join(self.missing)

    def since(self, before: Counters) -> float | None:
        """Joules between two readings; None where nothing counts."""
        if not self.joules or self.joules.keys() != before.joules.keys():
            return None
        return sum(now - before.joules[name] + (self.wraps.get(name, 0.0) if now < before.joules[name] else 0.0)
                   for name, now in self.joules.items())


def read(powercap: Path | None = None) -> Counters:
    """All counters of this machine, now."""
    joules, wraps, rapl = _rapl(powercap or POWERCAP)
    cards, nvml = _nvml()
    return Counters({**joules, **cards}, wraps, tuple(why for why in (rapl, nvml) if why))


def _rapl(root: Path) -> tuple[dict[str, float], dict[str, float], str]:
    """Packages only: cores, graphics and memory are parts of them, or counted by few machines."""
    found = sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1)
    if not found:
        return {}, {}, f"RAPL: {root} lists no processor package"
    joules, wraps = {}, {}
    for package in found:
        try:
            joules[f"RAPL {package.name}"] = int((package / "energy_uj").read_text()) / 1e6
            wraps[f"RAPL {package.name}"] = int((package / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError) as error:
            return {}, {}, f"RAPL: {package / 'energy_uj'} cannot be read ({error})"
    return joules, wraps, ""


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(NVML)
    except OSError as error:
        return None, f"NVML: {error}"
    return (library, "") if library.nvmlInit_v2() == 0 else (None, "NVML: it does not start")


def _nvml() -> tuple[dict[str, float], str]:
    """Millijoules since the driver was loaded, by card."""
    library, why = _library()
    if library is None:
        return {}, why
    count, card, spent, joules = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_ulonglong(), {}
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for i in range(count.value):
        if library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(card)) or library.nvmlDeviceGetTotalEnergyConsumption(
                card, ctypes.byref(spent)):
            return {}, f"NVML: card {i} does not count its energy"
        joules[f"NVML card {i}"] = spent.value / 1e3
    return joules, "" if joules else "NVML: there is no card"

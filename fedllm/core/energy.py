"""Declared power: what a device draws and what a link costs, for joules where no meter can be read.

The constants are round figures that a recipe may replace. Radio energy by bit is from Huang et al., MobiSys 2012 (Wi-Fi
283 nJ up and 137 nJ down, LTE 438 and 52); 5G, wired lines and all devices are ours, from data sheets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import Knobs, knob


@dataclass(frozen=True)
class Link(Knobs):
    """A line between a client and the server."""

    bandwidth: float = knob(12.5e6, "bytes a second, up and down", gt=0)
    latency: float = knob(0.0, "seconds that each message is under way beside what its bytes take", ge=0)
    up: float = knob(0.0, "joules a bit that the end draws for what it sends", ge=0)
    down: float = knob(0.0, "joules a bit that the end draws for what it receives", ge=0)


@dataclass(frozen=True)
class Device(Knobs):
    """A machine at work."""

    flops: float = knob(1e12, "peak floating-point operations a second", gt=0)
    active_watts: float = knob(10.0, "drawn while it computes", gt=0)
    idle_watts: float = knob(1.0, "drawn while it waits", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.idle_watts > self.active_watts:
            raise RecipeError(f"Device.idle_watts = {self.idle_watts!r} is not allowed; it must be <= active_watts, "
                              f"{self.active_watts!r}")


LINKS: Mapping[str, Link] = {
    "wifi": Link(12.5e6, 0.005, 283e-9, 137e-9), "lte": Link(2.5e6, 0.05, 438e-9, 52e-9),
    "5g": Link(25e6, 0.015, 100e-9, 20e-9), "lan": Link(125e6, 0.0005, 5e-9, 5e-9)}
DEVICES: Mapping[str, Device] = {
    "phone": Device(1e12, 5.0, 1.0), "raspberry_pi": Device(6e10, 8.0, 3.0), "jetson_orin": Device(5.3e12, 50.0, 10.0),
    "laptop": Device(5e11, 45.0, 8.0), "gpu_server": Device(1.56e14, 400.0, 60.0)}
Part = TypeVar("Part", Link, Device)


def link_of(value: Any, path: str) -> Link:
    """A link by its name, or from a mapping of its numbers."""
    return _named(Link, LINKS, value, path)


def device_of(value: Any, path: str) -> Device:
    """A device by its name, or from a mapping of its numbers."""
    return _named(Device, DEVICES, value, path)


def _named(kind: type[Part], known: Mapping[str, Part], value: Any, path: str) -> Part:
    if isinstance(value, Mapping):
        return kind.make(value, path)
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"{path} = {value!r} is unknown{hint or '.'} Allowed: {', '.join(known)}, or a mapping of "
                          f"{', '.join(kind.knobs())}")
    return known[value]

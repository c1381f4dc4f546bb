"""An edge server that serves several viewers of virtual reality: in each slot it shares out band and compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import Scene, Step, layout

MOST = 6
"""Viewers that an observation has room for; of those who are not there it holds zeros."""
SHARES = ("equal", "attention", "channel")
"""How band and compute are shared out: evenly, by what viewers look at, or so that all are sent to as fast."""
LEVELS = 5
"""Resolutions: 1/16, 1/8, 1/4, 1/2 of the full one, and all of it."""
OUTSIDE = 0.25
"""Resolution of the tiles that nobody looks at, by that of those in sight."""
BITS, CYCLES, SOON = 1.0, 0.25, 0.02
"""A full frame in Mbit and in Gcycles, and the seconds (20 ms) after which it comes too late."""
SPREAD_OF_GAIN, MEMORY, SIGNAL = 1.0, 0.9, 4.0
"""Deviation and memory from slot to slot of a viewer's log gain, and what a gain of 1 is of the noise, in nats."""


def equal_share(seen: np.ndarray) -> int:
    """Everybody gets as much, at the resolution that viewers prefer."""
    return _preferred(seen, "equal")


def proportional(seen: np.ndarray) -> int:
    """Who looks at more gets more, at the resolution that viewers prefer."""
    return _preferred(seen, "attention")


def _preferred(seen: np.ndarray, share: str) -> int:
    _, attention, wants = seen.reshape(3, MOST)
    return SHARES.index(share) * LEVELS + int(np.rint(wants[attention > 0].mean() * (LEVELS - 1)))


@dataclass(frozen=True)
class EdgeVR(Scene):
    """In each slot: how band and compute are shared out, and at which resolution. A viewer's quality is what he sees in
    the tiles that he looks at and in the others, minus what comes late and how far it is from what he prefers.

    Seen are channels, attention and wishes; how much band and compute there is, and how much lateness costs, is the
    server's own and not seen: it shows in what allocations bring, and in `cues`.
    """

    users: int = knob(0, "viewers; 0: 2 to 6, as the layout has it", ge=0, le=MOST)
    band: float = knob(12.0, "MHz of a server, where layouts do not differ", gt=0)
    compute: float = knob(25.0, "Gcycles a second of a server, where layouts do not differ", gt=0)
    penalty: float = knob(1.0, "what 20 ms beyond the first 20 cost, where layouts do not differ", ge=0)
    spread: float = knob(0.8, "deviation of the logarithms of band, compute and penalty from layout to layout", ge=0,
                         le=3)
    pull: float = knob(0.2, "what it costs to be all levels away from the preferred one", ge=0)
    slots: int = knob(12, "slots of an episode", ge=1)
    layout: int = layout
    size, actions = 3 * MOST, len(SHARES) * LEVELS
    habits: ClassVar[Mapping[str, Callable[[np.ndarray], int]]] = {"equal_share": equal_share,
                                                                   "proportional": proportional}

    def env(self) -> Server:
        return Server(self)

    def own(self) -> tuple[int, float, float, float]:
        """The layout's viewers, band, compute and penalty."""
        rng = numpy_stream(self.layout, "edge_vr")
        users, scale = int(rng.integers(2, MOST + 1)), np.exp(self.spread * rng.standard_normal(3))
        band, compute, penalty = (float(x) for x in np.array([self.band, self.compute, self.penalty]) * scale)
        return self.users or users, band, compute, penalty

    def cues(self) -> np.ndarray:
        users, band, compute, penalty = self.own()
        return np.array([users / MOST, np.log(band / 12), np.log(compute / 25), np.log1p(penalty)], np.float32)


class Server:
    """The slots."""

    def __init__(self, scene: EdgeVR) -> None:
        self.scene = scene
        self.users, self.band, self.compute, self.penalty = scene.own()

    def reset(self, seed: int) -> np.ndarray:
        self.rng, self.left = np.random.default_rng(seed), self.scene.slots
        self.gain, self.look = self.rng.standard_normal((2, self.users))
        self.wants = self.rng.integers(1, LEVELS, self.users)
        return self._seen()

    def step(self, action: int) -> Step:
        reward, self.left = self.quality(*divmod(action, LEVELS)), self.left - 1
        fresh = np.sqrt(1 - MEMORY**2) * self.rng.standard_normal((2, self.users))
        self.gain, self.look = MEMORY * self.gain + fresh[0], MEMORY * self.look + fresh[1]
        return self._seen(), reward, self.left == 0

    def quality(self, share: int, level: int) -> float:
        """The viewers' mean: attention-weighted log(1 + resolution), minus lateness, minus distance from the wish."""
        a = self.attention
        sharp = 2.0 ** (level - LEVELS + 1)  # of the full resolution, in the tiles in sight
        load = sharp * (a + (1 - a) * OUTSIDE)  # of a full frame
        speed = np.log2(1 + np.exp(SIGNAL + SPREAD_OF_GAIN * self.gain))  # bits a second and Hz
        by = (np.ones_like(a), a, 1 / speed)[share]
        part = by / by.sum()
        seconds = load * (CYCLES / (self.compute * part) + BITS / (self.band * part * speed))
        good = a * np.log1p(16 * sharp) + (1 - a) * np.log1p(16 * sharp * OUTSIDE)
        late = np.clip(seconds / SOON - 1, 0, 2)  # what comes after three times as long is not waited for
        off = np.abs(level - self.wants) / (LEVELS - 1)
        return float((good / np.log(17) - self.penalty * late - self.scene.pull * off).mean())

    @property
    def attention(self) -> np.ndarray:
        """The share of all tiles that each viewer looks at."""
        return 0.1 + 0.5 / (1 + np.exp(-self.look))

    def _seen(self) -> np.ndarray:
        seen = np.zeros((3, MOST), np.float32)
        seen[:, : self.users] = self.gain, self.attention, self.wants / (LEVELS - 1)
        return seen.reshape(-1)

"""Weather stations on a map: seasons and days of a climate, fronts that pass over neighbors, and noise that lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.data.simulated.registry import Simulated
from fedllm.data.table import Table

NAMES = ("temperature", "pressure", "humidity", "wind", "radiation", "dew")
DAY, YEAR = 24, 1200
"""Steps of a day, and of a (short) year."""


@dataclass(frozen=True)
class Stations(Simulated):
    """Columns station, climate, hour and the variables; a climate has its own loadings, daily swing, wind and noise."""

    stations: int = knob(12, "stations, dealt to the climates in turn", ge=1)
    climates: int = knob(3, "climates, each with dynamics of its own", ge=1)
    steps: int = knob(600, "hourly readings of a station", ge=2)
    variables: int = knob(5, "variables of a reading, temperature first", ge=1, le=6)
    noise: float = knob(0.3, "size of what no front and no season explains", ge=0)
    missing: float = knob(0.0, "share of readings that are not there", ge=0, lt=1)

    def tables(self, seed: int) -> Sequence[Table]:
        rng = numpy_stream(seed, "stations")
        at = rng.uniform(0, 10, (self.stations, 2))
        fronts = self._fronts(rng)
        rows = []
        climates = [self._climate(rng) for _ in range(self.climates)]
        for s in range(self.stations):
            values = self._readings(at[s], climates[s % self.climates], fronts, rng)
            gone = rng.random(values.shape) < self.missing
            rows += [{"station": f"station-{s:02d}", "climate": f"climate-{s % self.climates}", "hour": t,
                      **{n: None if gone[t, j] else round(float(values[t, j]), 4)
                         for j, n in enumerate(NAMES[: self.variables])}} for t in range(self.steps)]
        return [Table("sim:stations", rows)]

    def _fronts(self, rng: np.random.Generator) -> list[tuple[float, np.ndarray, np.ndarray, float]]:
        """(hour of birth, where, how it moves an hour, how strong): one in about ten hours."""
        count = max(1, self.steps // 10)
        return [(float(rng.uniform(-40, self.steps)), rng.uniform(-2, 12, 2), rng.normal((0.15, 0.05), 0.05, 2),
                 float(rng.normal(0, 1.5))) for _ in range(count)]

    def _climate(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        v = self.variables
        return {"mean": rng.normal(0, 4, v), "day": rng.uniform(0.2, 2.0, v), "phase": rng.uniform(0, DAY, v),
                "year": rng.uniform(0.5, 2, v), "front": rng.normal(0, 1.2, v),
                "last": rng.choice([[0.6, 0.2], [1.4, -0.5], [0.2, -0.6], [0.9, 0.0]])}

    def _readings(self, at: np.ndarray, climate: dict[str, np.ndarray],
                  fronts: list[tuple[float, np.ndarray, np.ndarray, float]], rng: np.random.Generator) -> np.ndarray:
        """[steps, variables]: mean + day + year + fronts that pass + an AR(2) of the climate."""
        t, v = np.arange(self.steps), self.variables
        passing = np.zeros(self.steps)
        for born, where, way, strong in fronts:
            gone = ((where + np.outer(t - born, way) - at) ** 2).sum(1)
            passing += strong * np.exp(-gone / 2.0) * (np.abs(t - born - 20) < 40)
        lasting, shocks = np.zeros((self.steps, v)), rng.normal(0, self.noise, (self.steps, v))
        for i in range(self.steps):
            lasting[i] = shocks[i] + (climate["last"][0] * lasting[i - 1] if i else 0) + (
                climate["last"][1] * lasting[i - 2] if i > 1 else 0)
        day = climate["day"] * np.sin(2 * np.pi * (t[:, None] + climate["phase"]) / DAY)
        year = climate["year"] * np.sin(2 * np.pi * t[:, None] / YEAR)
        return climate["mean"] + day + year + passing[:, None] * climate["front"] + lasting

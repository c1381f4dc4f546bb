"""Glyphs with captions: some clients have pictures, some texts, some both; pairs that are nobody's are public."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.data.simulated.registry import Simulated
from fedllm.data.table import Table

SHAPES, COLORS = ("cross", "square", "bar", "ring", "corner", "slash"), ("red", "green", "blue", "grey")
FORMS = ("a {color} {shape}", "this {shape} is {color}", "one {shape} in {color}", "{color} and a {shape}")
PAINT = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "grey": (0.6, 0.6, 0.6)}
SIDE, EDGE = 16, 7


@dataclass(frozen=True)
class Glyphs(Simulated):
    """Columns client, kind, image [3, 16, 16], text and label (the shape); kinds are dealt to the clients in turn."""

    clients: int = knob(6, "clients, by turns of pictures, of texts and of both", ge=1)
    rows: int = knob(48, "rows of a client", ge=4)
    public_rows: int = knob(64, "pairs that belong to nobody", ge=4)
    test_rows: int = knob(96, "pairs of the global test", ge=4)
    noise: float = knob(0.8, "of a picture's numbers, which are -1 to 1", ge=0)
    typos: float = knob(0.25, "share of texts that leave their shape out", ge=0, lt=1)
    skew: float = knob(1.0, "Dirichlet concentration of a client's shapes", gt=0)

    def tables(self, seed: int) -> Sequence[Table]:
        rng, rows = numpy_stream(seed, "glyphs"), []
        for c in range(self.clients):
            kind = ("image", "text", "pair")[c % 3]
            mix = rng.dirichlet(np.full(len(SHAPES), self.skew))
            for _ in range(self.rows):
                row = self._pair(rng, int(rng.choice(len(SHAPES), p=mix)))
                lost = {"image": "text", "text": "image"}.get(kind)
                rows.append({"client": f"{kind}-{c // 3}", "kind": kind, **{n: v for n, v in row.items() if n != lost}})
        return [Table("sim:glyphs", rows)]

    def public(self, seed: int) -> Sequence[Table]:
        rng = numpy_stream(seed, "glyphs", "public")
        return [Table("sim:glyphs (public)", [self._pair(rng, i % len(SHAPES)) for i in range(self.public_rows)])]

    def test(self, seed: int) -> Sequence[Table]:
        rng = numpy_stream(seed, "glyphs", "test")
        return [Table("sim:glyphs (test)", [self._pair(rng, i % len(SHAPES)) for i in range(self.test_rows)])]

    def _pair(self, rng: np.random.Generator, shape: int) -> dict[str, object]:
        color = COLORS[rng.integers(len(COLORS))]
        x = rng.normal(0, self.noise, (3, SIDE, SIDE))
        at = rng.integers(0, SIDE - EDGE, 2)
        x[:, at[0] : at[0] + EDGE, at[1] : at[1] + EDGE] += np.array(PAINT[color])[:, None, None] * drawn(shape) * 1.5
        told = "thing" if rng.random() < self.typos else SHAPES[shape]
        return {"image": x.round(3).tolist(), "label": SHAPES[shape],
                "text": FORMS[rng.integers(len(FORMS))].format(color=color, shape=told)}


def drawn(shape: int) -> np.ndarray:
    """The shape [7, 7] of 0 and 1."""
    i, j = np.indices((EDGE, EDGE))
    edge = (i == 0) | (j == 0) | (i == EDGE - 1) | (j == EDGE - 1)
    return ((i == 3) | (j == 3), np.ones((EDGE, EDGE), bool), (i > 1) & (i < 5), edge, (i == 0) | (j == 0),
            abs(i - j) < 2)[shape].astype(float)

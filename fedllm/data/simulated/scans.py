"""Scans of organs with questions about them: each organ is a client, with a brightness and answers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.data.simulated.registry import Simulated
from fedllm.data.table import Table

ORGANS = ("lung", "liver", "brain", "kidney", "heart")
SIDE = 16
QUESTIONS = ("which organ is shown", "is there a lesion", "on which side is the lesion", "how many lesions are there",
             "is the largest lesion bright or dark")


@dataclass(frozen=True)
class Scans(Simulated):
    """Columns organ, image [16, 16] of grey, text (the question) and label (the answer)."""

    organs: int = knob(5, "organs, a client each", ge=2, le=len(ORGANS))
    rows: int = knob(80, "questions of an organ", ge=10)
    noise: float = knob(0.3, "of a scan's numbers", ge=0)
    shuffled: int = knob(-1, "the organ (from 0) whose answers are dealt out anew, so that they say nothing; -1: none",
                         ge=-1)

    def tables(self, seed: int) -> Sequence[Table]:
        rng, rows = numpy_stream(seed, "scans"), []
        for k, organ in enumerate(ORGANS[: self.organs]):
            mine = [self._row(rng, k, organ) for _ in range(self.rows)]
            if k == self.shuffled:
                answers = [row["label"] for row in mine]
                mine = [{**row, "label": answers[i]} for row, i in zip(mine, rng.permutation(len(mine)), strict=True)]
            rows += mine
        return [Table("sim:scans", rows)]

    def _row(self, rng: np.random.Generator, k: int, organ: str) -> dict[str, object]:
        i, j = np.indices((SIDE, SIDE)) - SIDE / 2
        inside = (i / (7 - k % 3)) ** 2 + (j / (4.5 + k % 2 * 2)) ** 2 < 1
        x = (0.4 + 0.15 * k) * inside * (1 + 0.3 * np.sin((k + 1) * j)) + rng.normal(0, self.noise, (SIDE, SIDE))
        count = int(rng.choice(4, p=np.roll([0.4, 0.3, 0.2, 0.1], k)))
        left, bright = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        for _ in range(count):
            at = rng.integers(3, 11), (rng.integers(1, 6) if left else rng.integers(9, 14))
            x[at[0] : at[0] + 2, at[1] : at[1] + 2] = 2.5 if bright else -1.5
        ask = int(rng.integers(len(QUESTIONS) if count else 2))
        answer = (organ, "yes" if count else "no", "left" if left else "right", f"{count} lesions",
                  "bright" if bright else "dark")[ask]
        return {"organ": organ, "image": x.round(3).tolist(), "text": QUESTIONS[ask], "label": answer}

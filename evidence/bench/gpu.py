"""Training tokens per second of a simulated round on one CUDA card, beside a plain PEFT loop on the same card.

The clock is wall time with the card's queue drained, the base is bf16 (trainables fp32), weights are random.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from evidence.bench.rows import Row, machine, row
from evidence.bench.simulation import Contender, Ours, Size, plain_peft, race, ratio, span
from fedllm.core.errors import FedLLMError
from fedllm.local import power

SIZES = (
    Size("160M B1 T256", 576, 30, clients=16, steps=4, batch=1, length=256, vocabulary=32000, device="cuda"),
    Size("1B B1 T512", 2048, 16, clients=8, steps=4, batch=1, length=512, vocabulary=32000, device="cuda"),
    Size("1B B4 T512", 2048, 16, clients=8, steps=2, batch=4, length=512, vocabulary=32000, device="cuda"),
    Size("7B B1 T512", 4096, 32, clients=4, steps=2, batch=1, length=512, vocabulary=32000, device="cuda"),
)
LANES = (1, 4, 16, 32)


def gpu(sizes: Sequence[Size] = SIZES) -> list[Row]:
    """Ours beside the loop at each size, and ours by how many clients share a step. FedLLMError without a card."""
    if not torch.cuda.is_available():
        raise FedLLMError("bench gpu: this machine has no CUDA card")
    return [*(_beside_peft(size) for size in sizes), _by_lanes(sizes[0])]


def drained() -> float:
    """Seconds, once the card has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Metered:
    """A contender whose rounds are counted in tokens, in joules of the card, and in its memory at the most."""

    def __init__(self, inner: Contender) -> None:
        self.inner, self.tokens, self.peak = inner, 0, 0
        self.joules: float | None = 0.0

    def round(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = power.read()
        tokens = self.inner.round()
        torch.cuda.synchronize()
        spent = power.read().since(before)
        self.joules = None if spent is None or self.joules is None else self.joules + spent
        self.peak, self.tokens = max(self.peak, torch.cuda.max_memory_allocated()), self.tokens + tokens
        return tokens

    def told(self) -> dict[str, Any]:
        """Figures over all rounds; memory includes the other side's weights, joules are None where nothing counts."""
        joules = None if self.joules is None else round(1e3 * self.joules / self.tokens, 1)
        return {"peak_gb": round(self.peak / 1e9, 2), "joules_per_1000_tokens": joules}


def _beside_peft(size: Size) -> Row:
    bare = Ours(size, torch.bfloat16)
    sides = {"ours": Metered(bare), "plain_peft": Metered(plain_peft(size, bare, torch.bfloat16))}
    speeds = race(sides, repeats=2, floor=0.5, clock=drained)
    tokens = {name: round(median(s)) for name, s in speeds.items()}
    found = row(f"gpu/{size.label} vs plain PEFT", ratio(speeds, "ours", "plain_peft"), "times", "plain PEFT loop",
                span=span(speeds, "ours", "plain_peft"), tokens_per_s=tokens,
                tflops={n: round(t * size.flops / 1e12, 1) for n, t in tokens.items()}, lanes=size.clients, **_where(),
                **{name: side.told() for name, side in sides.items()})
    del bare, sides
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _by_lanes(size: Size) -> Row:
    found = {}
    for k in LANES:
        ours: Contender = Ours(replace(size, clients=k), torch.bfloat16)
        found[k] = round(median(race({"ours": ours}, 2, 0.5, drained)["ours"]))
    return row(f"gpu/{size.label} {LANES[-1]} clients a step vs 1", found[LANES[-1]] / found[1], "times",
               "ours, one client a step", tokens_per_s=found, **_where())


def _where() -> dict[str, str]:
    return {"card": torch.cuda.get_device_name(), "host": machine()["cpu"], "clock": "wall time, queue drained"}

"""Training tokens per second of a simulated round on one CUDA card, beside a plain PEFT loop on the same card.

The clock is wall time with the card's queue drained, the base is bf16 (trainables fp32), weights are random.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fedllm.app.bench_rows import Row, machine, row
from fedllm.app.bench_simulation import Contender, Ours, Size, plain_peft, race, ratio, span
from fedllm.core.errors import FedLLMError
from fedllm.local import power

SIZES = (
    Size("160M B1 T256", 576, 30, clients=16, steps=2, batch=1, length=256, vocabulary=32000, device="cuda"),
    Size("160M B4 T256", 576, 30, clients=16, steps=2, batch=4, length=256, vocabulary=32000, device="cuda"),
    Size("1B B1 T512", 2048, 16, clients=8, steps=2, batch=1, length=512, vocabulary=32000, device="cuda"),
    Size("1B B4 T512", 2048, 16, clients=8, steps=2, batch=4, length=512, vocabulary=32000, device="cuda"),
    Size("7B B1 T512", 4096, 32, clients=4, steps=2, batch=1, length=512, vocabulary=32000, device="cuda"),
)


def gpu() -> list[Row]:
    """All sizes in bf16, and the smallest in fp32. FedLLMError where there is no card."""
    if not torch.cuda.is_available():
        raise FedLLMError("bench gpu: this machine has no CUDA card")
    rows = [_row(size, torch.bfloat16) for size in SIZES]
    return [*rows, _row(SIZES[0], torch.float32)]


def drained() -> float:
    """Seconds, once the card has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _row(size: Size, dtype: torch.dtype) -> Row:
    ours = Ours(size, dtype)
    loop = plain_peft(size, ours, dtype)
    speeds = race({"ours": ours, "plain_peft": loop}, repeats=3, floor=0.5, clock=drained)
    costs = {name: _cost(c.round) for name, c in (("ours", ours), ("plain_peft", loop))}
    tokens = {name: round(median(s)) for name, s in speeds.items()}
    kind = str(dtype).removeprefix("torch.")
    del ours, loop
    gc.collect()
    torch.cuda.empty_cache()
    return row(f"gpu/{size.label} {kind} vs plain PEFT", ratio(speeds, "ours", "plain_peft"), "times",
               "plain PEFT loop", span=span(speeds, "ours", "plain_peft"), tokens_per_s=tokens, lanes=size.clients,
               tflops={n: round(t * size.flops / 1e12, 1) for n, t in tokens.items()},
               card=torch.cuda.get_device_name(), host=machine()["cpu"], clock="wall time, queue drained", **costs)


def _cost(work: Callable[[], int]) -> dict[str, Any]:
    """Peak memory of the card in GB (the other side's weights included), and joules a thousand tokens."""
    torch.cuda.reset_peak_memory_stats()
    before, start, tokens = power.read(), drained(), 0
    while not tokens or drained() - start < 1.0:
        tokens += work()
    spent = power.read().since(before)
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "joules_per_1000_tokens": None if spent is None else round(1000 * spent / tokens, 2)}


def lanes(size: Size = SIZES[0], counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)) -> dict[int, int]:
    """Tokens per second of ours by how many clients share a step."""
    found = {}
    for k in counts:
        ours: Contender = Ours(replace(size, clients=k), torch.bfloat16)
        found[k] = round(median(race({"ours": ours}, 2, 1.0, drained)["ours"]))
    return found

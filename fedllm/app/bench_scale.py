"""Peak memory of one round with a thousand simulated clients, beside one with a hundred."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import torch

from fedllm.app.bench_rows import Row, memory_mb, row, subprocess_row
from fedllm.app.bench_simulation import Ours, Size

TINY = Size("tiny", 128, 4, ("q_proj", "v_proj"), steps=1, batch=2, length=32, vocabulary=2048)


def scale(few: int = 100, many: int = 1000) -> list[Row]:
    """One round each, in a process of its own, on the vectorized engine with LoRA of rank 4."""
    seen = {n: subprocess_row("fedllm.app.bench_scale", str(n)) for n in (few, many)}
    grown = seen[many]["peak_mb"] / seen[few]["peak_mb"]
    return [row(f"scale/peak memory of {many} clients", grown, "times", f"{few} clients", 1.1, least=True,
                seen={str(n): s for n, s in seen.items()})]


def one_round(clients: int) -> dict[str, float]:
    """Train `clients` clients once and say what it took."""
    start, ours = time.process_time(), Ours(replace(TINY, clients=clients), rank=4)
    before = memory_mb()
    tokens = ours.round()
    peak = memory_mb(peak=True)
    return {"peak_mb": round(peak), "grown_mb": round(peak - before), "tokens": tokens,
            "cpu_s": round(time.process_time() - start, 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(one_round(int(sys.argv[1]))))

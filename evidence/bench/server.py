"""What the server's own work costs: aggregation, serialization, and the SVD of FlexLoRA."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from evidence.bench.rows import Row, memory_mb, peer, row, subprocess_row
from fedllm.core.reduce import Mean
from fedllm.methods._linalg import cut, factored_svd
from fedllm.models.kernels import keep_freed_memory
from fedllm.wire import codec

UPDATES = 64
MB = 1 << 20


def aggregation(updates: int = UPDATES, repeats: int = 3) -> list[Row]:
    """Streaming FedAvg of 50 MB updates beside a sum of dictionaries, and how much memory it needs.

    Each turn is a process of its own, so that the peer's memory is managed as its users have it, ours as a run does.
    """
    turn = [{side: subprocess_row("evidence.bench.server", side, str(updates)) for side in ("ours", "dict_sum")}
            for _ in range(repeats)]
    times = {side: [t[side]["seconds"] for t in turn] for side in turn[0]}
    rows = [row("aggregation/FedAvg of 64 x 50 MB", ratio(times, "dict_sum", "ours"), "times", "sum of dictionaries", 8,
                13, gb_per_cpu_s={n: round(turn[0][n]["bytes"] / median(t) / 1e9, 2) for n, t in times.items()})]
    held = {n: subprocess_row("evidence.bench.server", "peak", str(n))["updates"] for n in (16, 64)}
    return [*rows, row("aggregation/peak memory", max(held.values()), "updates", "all clients' updates at once", 3, 2,
                       least=True, by_clients=held)]


def aggregate(side: str, updates: int) -> dict[str, float]:
    """CPU-seconds of one side's aggregation in this process, after a first one to warm up."""
    pool = [update(seed) for seed in range(4)]  # four distinct ones take turns, so that the machine need not hold 64
    each = [pool[i % 4] for i in range(updates)]
    if side == "ours":
        keep_freed_memory()
        work = functools.partial(stream, each)
    else:
        work = functools.partial(peer(side).dict_sum, each, [1.0] * updates)
    return {"seconds": turns({side: work}, 1)[side][0], "bytes": updates * sum(t.nbytes for t in pool[0].values())}


def update(seed: int) -> dict[str, Tensor]:
    """50 MB of fp32: a dozen matrices of 4 MB and what is left in vectors."""
    rng = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(1024, 1024, generator=rng) for i in range(12)} | {
        f"b{i}": torch.randn(65536, generator=rng) for i in range(8)}


def stream(updates: Any) -> Mapping[str, Any]:
    """Fold the updates one at a time, as an engine does."""
    reducer = Mean()
    acc = reducer.zero()
    for one in updates:
        acc = reducer.add(acc, {**one, "n": 1})
        del one  # or it would live on while the next one is made
    return reducer.done(acc)


def peak(clients: int) -> dict[str, float]:
    """Most memory held while updates of this many clients are made and folded, in updates."""
    before = memory_mb()
    kept = stream(update(seed) for seed in range(clients))
    size = sum(t.numel() * 4 for t in kept.values() if isinstance(t, Tensor)) / MB
    return {"updates": round((memory_mb(peak=True) - before) / size, 2)}


def codec_rows(repeats: int = 7) -> list[Row]:
    """A LoRA update of 896 tiny tensors and a dozen of 4 MB, as bytes and back, beside Flower's ArrayRecord."""
    rng, flower, rows = torch.Generator().manual_seed(0), peer("flower_record"), []
    cases = {"896 LoRA tensors": {f"base_model.model.layers.{i}.lora.weight": torch.randn(8, 512, generator=rng)
                                  for i in range(896)},
             "12 x 4 MB": {f"layers.{i}.weight": torch.randn(1024, 1024, generator=rng) for i in range(12)}}
    for name, state in cases.items():
        ours, theirs = codec.encode(state), flower.encode(state)
        size = sum(t.numel() * 4 for t in state.values())
        encode = turns({"ours": lambda s=state: codec.encode(s), "flower": lambda s=state: flower.encode(s)}, repeats)
        decode = turns({"ours": lambda d=ours: codec.decode(d), "flower": lambda d=theirs: flower.decode(d)}, repeats)
        for way, times, moonshot in (("encode", encode, 20), ("decode", decode, 12)):
            speed = {n: round(size / median(t) / 1e6) for n, t in times.items()}
            rows.append(row(f"codec/{name} {way}", ratio(times, "flower", "ours"), "times", "Flower's ArrayRecord", 8,
                            moonshot, mb_per_cpu_s=speed))
    return rows


def svd(d: int = 2048, clients: int = 10, rank: int = 8, repeats: int = 3) -> list[Row]:
    """The rank-r SVD of sum_k w_k B_k A_k from the factors, beside the SVD of the sum itself."""
    rng = torch.Generator().manual_seed(0)
    b = torch.randn(d, clients * rank, generator=rng) / clients  # the weights w_k are in B
    a = torch.randn(clients * rank, d, generator=rng)

    def dense() -> tuple[Tensor, Tensor]:
        return cut(tuple(torch.linalg.svd(b @ a, full_matrices=False)), rank)

    times = turns({"ours": lambda: cut(factored_svd(b, a), rank), "dense": dense}, repeats)
    u, s, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    exact = u[:, :rank] * s[:rank] @ vt[:rank]
    left, right = cut(factored_svd(b, a), rank)
    error = float((left.double() @ right.double() - exact).norm() / exact.norm())
    return [row(f"svd/d={d} K={clients} r={rank}", ratio(times, "dense", "ours"), "times", "dense SVD", 200, 480,
                ms={n: round(1e3 * median(t), 2) for n, t in times.items()}),
            row(f"svd/d={d} K={clients} r={rank} error", error, "relative", "dense SVD in fp64", 1e-5, 1e-6,
                least=True)]


def turns(work: Mapping[str, Callable[[], Any]], repeats: int, floor: float = 0.05) -> dict[str, list[float]]:
    """CPU-seconds of each, turn by turn, after one warm-up each; a turn lasts `floor` seconds or one call."""
    for do in work.values():
        do()
    out: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, do in work.items():
            gc.collect()
            calls, start = 0, time.process_time()
            while not calls or time.process_time() - start < floor:
                do()
                calls += 1
            out[name].append((time.process_time() - start) / calls)
    return out


def ratio(times: Mapping[str, list[float]], slow: str, quick: str) -> float:
    """Median over turns of how many times quicker."""
    return median(a / b for a, b in zip(times[slow], times[quick], strict=True))


if __name__ == "__main__":
    import json
    import sys

    torch.set_num_threads(1)
    what, clients = sys.argv[1], int(sys.argv[2])
    sys.stdout.write(json.dumps(peak(clients) if what == "peak" else aggregate(what, clients)))

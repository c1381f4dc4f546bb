"""Measure the Flower engine on this machine: `python -m evidence.bench.federation flower flower_speed`.

The stock app that its LoRA rounds are held against is benchmarks/peers/flower_stock.py: the same model, rows, batches
and steps, as Flower's own tutorials write them.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evidence.bench.rows import Row, peer, row
from fedllm.federation.flower import serve as flower_serve
from fedllm.federation.flower.link import FlowerLink
from fedllm.federation.flower.loopback import FlowerLoopback, flower_loopback
from fedllm.federation.nvflare.line import bench
from fedllm.federation.nvflare.loopback import JOINING, events

SIZE = 200_000_000
LORA: dict[str, Any] = {"name": "lora", "rounds": 3, "local": {"lr": 1e-2, "steps": 5, "batch_size": 4},
                        "evaluate": {"exact_match": False, "samples": 0, "clients": False}}


@contextmanager
def rig(**more: Any) -> Iterator[FlowerLoopback]:
    """A SuperLink and three sites."""
    with tempfile.TemporaryDirectory(prefix="fedllm-flower-", ignore_cleanup_errors=True) as folder, \
            flower_loopback(Path(folder).resolve(), **more) as made, made.serving_session():
        yield made


def line(made: FlowerLoopback, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds of an empty round to all sites, and of messages of these sizes to one."""
    folder = made.run_folder(made.recipe("fedavg", name="bench"))
    with flower_serve.flower_run(made.keys) as grid:
        here = flower_serve.await_nodes(grid, made.nodes, len(made.sites), JOINING)
        link = FlowerLink(grid, made.nodes)
        try:
            bench(link, here, sizes, folder)
        finally:
            link.close()
    return json.loads((folder / "bench.json").read_text())


def speed() -> list[Row]:
    """An empty round, 200 MB, and LoRA rounds against the stock app, which does the same work."""
    with rig() as made:
        found = line(made, (SIZE,))
        far = made.run(made.recipe("fedavg", **LORA))
        loads = json.loads((far.folder / "sites.json").read_text())
        took = [e["seconds"] for e in events(far.folder, "round")]
        stock = peer("flower_stock").measure(made.folder, made.sites, LORA)
    ours, theirs = statistics.median(took), statistics.median(stock["rounds"])
    return [
        row("federation/Flower: no-op round of 3 sites, median", found["noop_round"]["median"], "s", "stock: 3.7 s",
            0.5, least=True),
        row("federation/Flower: 200 MB one way", found[str(SIZE)]["one_way"], "s", "stock: 4.2 s"),
        row("federation/Flower: 200 MB there and back", found[str(SIZE)]["there_and_back"], "s", "stock: 6.2 s"),
        row("federation/Flower: LoRA rounds, times as fast as the stock app", theirs / ours, "x", "stock app", 4,
            ours=ours, stock=theirs),
        row("federation/Flower: model loads a site in that run", max(s["loads"] for s in loads.values()), "",
            f"stock: {stock['loads']} in all", 1, least=True)]

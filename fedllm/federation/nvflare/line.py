"""Measures a federation's line: the time of a message to every site and back, by size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from fedllm.core.errors import RunError
from fedllm.engines.far.line import Link
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.runs.folder import RunFolder

NOOPS = 60
HUGE = 1 << 30
"""Bytes from which a message is measured once, not three times."""
SLOWEST = 10e6
"""Bytes per second below which a line counts as dead."""
START = 120.0
"""Seconds that a site's process has to start."""


def bench(link: Link, names: Sequence[str], sizes: Sequence[int], folder: Path) -> None:
    """Writes `bench.json`: seconds of an empty round to all sites, and of `sizes` bytes one way and back, to one."""
    sites = Sites(link, names)
    for name in names:
        ends = time.monotonic() + START
        while sites.probe(name) is None:
            if time.monotonic() > ends:
                raise RunError(f"{name}: no sign of life in {START:g} s")
            time.sleep(0.2)
        sites.table[name].boot = sites.probe(name)
    out: dict[str, Any] = {"sites": len(names), "load": psutil.getloadavg()[0],
                           "memory_before_bytes": psutil.Process().memory_info().rss}
    with ThreadPoolExecutor(len(names)) as pool:
        rounds = [_timed(lambda: list(pool.map(lambda n: _echo(sites, n, b"", 0), names))) for _ in range(NOOPS)]
    out["noop_round"] = {"median": statistics.median(rounds), "least": min(rounds), "p90": sorted(rounds)[-NOOPS // 10]}
    one = [_timed(lambda: _echo(sites, names[0], b"", 0)) for _ in range(NOOPS)]
    out["noop_one_site"] = {"median": statistics.median(one), "least": min(one)}
    for size in sizes:
        data, times = bytearray(size), 3 if size < HUGE else 1
        down = [_timed(lambda data=data: _echo(sites, names[0], data, 0)) for _ in range(times)]
        both = [_timed(lambda data=data, size=size: _echo(sites, names[0], data, size)) for _ in range(times)]
        out[str(size)] = {"one_way": min(down), "there_and_back": min(both)}
    RunFolder(folder).write_json("bench.json", out)


def _echo(sites: Sites, name: str, body: bytes | bytearray, size: int) -> None:
    sites.ask(name, {"op": "echo", "protocol": PROTOCOL, "size": size}, body, 120.0 + (len(body) + size) / SLOWEST)


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

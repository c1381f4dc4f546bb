"""Measure fedllm beside what others run: `python -m evidence.bench simulation aggregation codec svd scale`.

The clock is process CPU time with one thread, and all contenders of a row take turns in one process, so that the
ratio holds on a busy machine too. docs/results/bench.json keeps the rows with the machine that gave them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from evidence.bench.arena import arena
from evidence.bench.federation import federation
from evidence.bench.gpu import gpu
from evidence.bench.llm import llm
from evidence.bench.privacy import privacy
from evidence.bench.quality import quality
from evidence.bench.rows import Row, merge
from evidence.bench.scale import scale
from evidence.bench.server import aggregation, codec_rows, svd
from evidence.bench.shards import shards
from evidence.bench.simulation import simulation
from evidence.bench.strength import strength
from evidence.bench.zeroth import zeroth_order
from fedllm.core.errors import RecipeError
from fedllm.models.kernels import keep_freed_memory

BENCHES: dict[str, Callable[[], Iterable[Row]]] = {
    "simulation": simulation, "aggregation": aggregation, "codec": codec_rows, "svd": svd, "scale": scale,
    "federation": federation, "privacy": privacy, "quality": quality, "arena": arena, "strength": strength,
    "zeroth_order": zeroth_order, "shards": shards, "gpu": gpu, "llm": llm}
APART = ("quality", "arena", "strength", "gpu", "llm")
"""Hours of work, for machines with a card, or with a model and data that must be there: only when named."""
OUT = Path("docs/results/bench.json")


def run_bench(names: Sequence[str], out: Path = OUT) -> list[Row]:
    """Run these benches (none named: all) one after the other; a row lands in `out` as soon as its bench gives
    it."""
    for name in names:
        if name not in BENCHES:
            raise RecipeError(f"bench {name!r} is unknown. Allowed: {', '.join(BENCHES)}")
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does; a peer in this process profits from it too
    try:
        for name in names or [n for n in BENCHES if n not in APART]:
            mine: list[Row] = []
            for made in BENCHES[name]():
                mine.append(made)
                merge([made], name, out, whole=False)
            merge(mine, name, out)
            rows += mine
    finally:
        torch.set_num_threads(threads)
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows for people to read."""
    sheet = Table(title="fedllm bench")
    for column in ("what", "value", "against", "gate", "moonshot", "passes"):
        sheet.add_column(column)
    for r in rows:
        marks = {None: "", True: "yes", False: "no"}
        sheet.add_row(r["name"], f"{r['value']:.4g} {r['unit']}", r["baseline"], *(
            "" if r[k] is None else f"{r[k]:g}" for k in ("gate", "moonshot")), marks[r["pass"]])
    return sheet


def main(names: Sequence[str] | None = None) -> None:
    """Run the benches named on the command line and show their rows."""
    Console().print(table(run_bench(sys.argv[1:] if names is None else names)))


if __name__ == "__main__":
    main()

"""A thousand rounds of one run, and what its process holds: `python -m evidence.drills.rounds [MODEL]`."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from fedllm.api import run

log = logging.getLogger(__name__)


def held(model: str = "embedded", total: int = 1000, step: int = 100) -> dict[int, float]:
    """Megabytes of the process that drives a run, in which its three clients work too, after each `step` rounds."""
    with tempfile.TemporaryDirectory(prefix="fedllm-rounds-") as folder:
        rows, found, over = Path(folder) / "rows.jsonl", dict[int, float](), threading.Event()
        rows.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "red"}) + "\n" for i in range(12)))
        events = Path(folder) / "runs" / "rounds" / "events.jsonl"

        def look() -> None:
            while not over.wait(0.5):
                done = sum('"kind":"round"' in line[:60] for line in events.open()) if events.exists() else 0
                if (at := done // step * step) and at not in found:
                    found[at] = round(psutil.Process().memory_info().rss / 2**20, 1)
                    log.info("%d rounds: %.1f MB", at, found[at])

        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        run({"name": "rounds", "model": model, "rounds": total, "engine": "in_process",
             "record": {"checkpoint_every": 10}, "local": {"steps": 1, "batch_size": 1, "max_length": 16},
             "space": {"name": "lora", "rank": 2}, "data": {"source": str(rows), "partition": {"kind": "iid",
             "clients": 3}, "test": 0.0},
             "evaluate": {"exact_match": False, "samples": 0, "clients": False}}, root=Path(folder) / "runs")
        over.set()
        watch.join(5)
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    mb = list(held(*sys.argv[1:2]).values())
    log.info("grown by %.2f %%", 100 * (max(mb) / mb[0] - 1))

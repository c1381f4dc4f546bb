"""NVFlare's main processes, begun and ended as one tree: nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fedllm.federation.process import end_tree

TRAIN = "nvflare.private.fed.app"
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2 << 20), "MALLOC_TRIM_THRESHOLD_": str(2 << 20)}
"""glibc gives back what a message took: else every thread's arena keeps the largest that it has seen."""


@contextlib.contextmanager
def kit_process(kit: Path, side: str, config: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """One NVFlare main process; it ends with this one, and its own job processes end with it."""
    words = [sys.executable, "-u", "-m", "fedllm.runs.watch", str(os.getpid()), f"{TRAIN}.{side}.{side}_train",
             "-m", str(kit), "-s", config, "--set", "secure_train=true", *more, "config_folder=config"]
    for left in ("shutdown.fl", "restart.fl", "pid.fl"):
        (kit / left).unlink(missing_ok=True)
    (kit / "transfer").mkdir(exist_ok=True)
    with (kit / "process.log").open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=kit, env={**os.environ, **MALLOC})
    try:
        yield process
    finally:
        end_tree(process.pid)
        process.wait(30)

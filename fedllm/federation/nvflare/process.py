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
MALLOC = {"server": {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
                     "MALLOC_TRIM_THRESHOLD_": str(2 << 20)},
          "client": {"MALLOC_ARENA_MAX": "2"}}
"""By side, what glibc is told. The coordinator gives back what a message took, else every thread's arena keeps the
largest that it has seen, and NVFlare's buffers of 512 KB a message leave holes. A site trains, and keeps what it frees
(`models.kernels.keep_freed_memory`)."""


@contextlib.contextmanager
def kit_process(kit: Path, side: str, config: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """One NVFlare main process; it ends with this one, and its own job processes end with it."""
    words = [sys.executable, "-u", "-m", "fedllm.runs.watch", str(os.getpid()), f"{TRAIN}.{side}.{side}_train",
             "-m", str(kit), "-s", config, "--set", "secure_train=true", *more, "config_folder=config"]
    for left in ("shutdown.fl", "restart.fl", "pid.fl"):
        (kit / left).unlink(missing_ok=True)
    (kit / "transfer").mkdir(exist_ok=True)
    with (kit / "process.log").open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=kit, env={**os.environ, **MALLOC[side]})
    try:
        yield process
    finally:
        end_tree(process.pid)
        process.wait(30)

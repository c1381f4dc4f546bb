"""NVFlare's main processes, begun and ended as one tree: nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

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


def end_tree(pid: int, patience: float = 10.0) -> None:
    """End a process and all that it started: asked first, then killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        all_of = [*top.children(recursive=True), top]
        for process in all_of:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(all_of, patience)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no child is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

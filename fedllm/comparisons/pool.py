"""Hands cells to worker processes, so many at once, and gives up one from which nothing is heard."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fedllm.comparisons.design import Cell
from fedllm.core.errors import RunError

SILENCE = 3600.0
"""Seconds without a line in a cell's log or record after which it is given up; a run is heard far oftener."""


class Worker:
    """One worker process; it ends when this one does."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedllm.comparisons.worker", str(os.getpid())], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True)  # Ctrl-C is for whoever began it

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do one job; what came of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        signs, began = [Path(job["log"]), Path(job["folder"]) / "events.jsonl"], time.time()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        while not select.select([self.process.stdout], [], [], 1.0)[0]:
            if time.time() - max([began, *(p.stat().st_mtime for p in signs if p.exists())]) > SILENCE:
                self.stop()
                return {"error": f"nothing was heard of it for {SILENCE:.0f} seconds; {job['log']} has more",
                        "kind": "silent"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "its worker process was ended", "kind": "died"}

    def stop(self) -> None:
        """End it now, and whatever it runs with it."""
        if self.process.poll() is None:
            self.process.kill()  # its child sees within a second that it is gone
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe and pipe.close()


class Pool:
    """So many workers, begun when they are first needed."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self.folder, self.jobs = folder, jobs
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        self.all: list[Worker] = []
        self.threads = ThreadPoolExecutor(jobs)

    def _one(self, what: str, cell: Cell, place: Path) -> dict[str, Any]:
        try:
            worker = self.idle.get_nowait()
        except Empty:
            worker = self._begun()
        log = self.folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        log.touch()
        try:
            got = worker.ask({"do": what, "recipe": cell.recipe.model_dump(), "folder": str(place / cell.name),
                              "log": str(log)})
        finally:
            if worker.process.poll() is None:
                self.idle.put(worker)
        return got

    def _begun(self) -> Worker:
        worker = Worker()
        self.all.append(worker)
        return worker

    def each(self, what: str, cells: Sequence[Cell], place: Path,
             tell: Callable[[Cell, dict[str, Any]], None]) -> dict[str, dict[str, Any]]:
        """Do this with every cell; cell's name -> what came of it. `tell` hears of each as it ends."""
        left: dict[Future[dict[str, Any]], Cell] = {self.threads.submit(self._one, what, c, place): c for c in cells}
        out: dict[str, dict[str, Any]] = {}
        while left:
            for future in wait(left, return_when=FIRST_COMPLETED).done:
                cell = left.pop(future)
                out[cell.name] = future.result()
                tell(cell, out[cell.name])
        return out

    def stop(self) -> None:
        """End all workers now; what they had begun is taken up the next time."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.all):
            worker.stop()
        self.threads.shutdown(wait=True)


@contextlib.contextmanager
def pool(jobs: int, folder: Path) -> Iterator[Pool]:
    """Workers for the time of the block."""
    if jobs < 1:
        raise RunError(f"--jobs {jobs}: allowed is a number from 1 up")
    workers = Pool(jobs, folder)
    try:
        yield workers
    finally:
        workers.stop()

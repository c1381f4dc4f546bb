"""DT-FM's cost of a schedule beside an iteration between real processes: `python -m evidence.bench.slow_lines`.

Machines are processes, lines are TCP connections of this machine whose sending end waits as long as the line's delay
and bandwidth say (the kernel here has no netem, which would let `tc` do it between network namespaces).
"""

from __future__ import annotations

import multiprocessing
import queue
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedllm.core.errors import RunError
from fedllm.methods._schedule import Lines, Schedule, cost, groups_of, search

TIMEOUT = 20.0
"""Seconds that anybody waits for anybody."""


def world(seed: int, n: int = 8) -> Lines:
    """Machines in four regions of two: quick inside, slow across."""
    rng = np.random.default_rng(seed)
    same = np.arange(n)[:, None] // 2 == np.arange(n)[None] // 2
    far, wide = rng.uniform(0.02, 0.12, (n, n)), rng.uniform(2e5, 4e5, (n, n))
    return Lines(np.where(same, 0.005, np.maximum(far, far.T)), np.where(same, 2e6, np.minimum(wide, wide.T)), 8e4, 2e4)


class Machine:
    """One process: it sends over slow lines, one after the other, and reads from whoever sends."""

    def __init__(self, me: int, lines: Lines, listener: socket.socket, ports: Sequence[int]) -> None:
        self.me, self.lines = me, lines
        self.out: dict[int, socket.socket] = {}
        self.got: dict[int, socket.socket] = {}
        self.there = threading.Event()
        threading.Thread(target=self._accept, args=(listener, len(ports) - 1), daemon=True).start()
        for other, port in enumerate(ports):
            if other != me:
                self.out[other] = socket.create_connection(("127.0.0.1", port), TIMEOUT)
                self.out[other].sendall(bytes([me]))
        if not self.there.wait(TIMEOUT):
            raise TimeoutError(f"machine {me}: not all others came within {TIMEOUT:g} s")

    def _accept(self, listener: socket.socket, count: int) -> None:
        listener.settimeout(TIMEOUT)
        for _ in range(count):
            one, _ = listener.accept()
            one.settimeout(TIMEOUT)
            self.got[one.recv(1)[0]] = one
        self.there.set()

    def send(self, to: int, size: int) -> None:
        """So many bytes, as late as the line is slow."""
        time.sleep(self.lines.delay[self.me, to] + size / self.lines.bandwidth[self.me, to])
        self.out[to].sendall(bytes(size))

    def read(self, of: int, size: int) -> None:
        left = size
        while left:
            if not (some := self.got[of].recv(min(left, 1 << 16))):
                raise ConnectionError(f"machine {self.me}: machine {of} is gone")
            left -= len(some)

    def iterate(self, plan: Schedule) -> None:
        """States forward, gradients back along the pipeline, then the stage's exchange, each a server of its share."""
        at = next(s for s, stage in enumerate(plan.stages) if self.me in stage)
        r, c_pp, last = plan.stages[at].index(self.me), int(self.lines.c_pp), len(plan.stages) - 1
        for step, ends in ((1, (0, last)), (-1, (last, 0))):
            if at != ends[0]:
                self.read(plan.stages[at - step][r], c_pp)
            if at != ends[1]:
                self.send(plan.stages[at + step][r], c_pp)
        others = [m for m in plan.stages[at] if m != self.me]
        share = int(self.lines.c_dp / (1 + len(others)))
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            for _ in range(2):  # shares to their servers, then means to all
                readers = [pool.submit(self.read, m, share) for m in others]
                for m in others:
                    self.send(m, share)
                for reading in readers:  # a line that is silent or ends is an error, and no quick iteration
                    reading.result()


def _run(me: int, lines: Lines, listener: socket.socket, ports: Sequence[int], plan: Schedule, iterations: int,
         gate: Any, told: Any) -> None:
    machine = Machine(me, lines, listener, ports)
    gate.wait(TIMEOUT)
    began = time.perf_counter()
    for _ in range(iterations):
        machine.iterate(plan)
        gate.wait(TIMEOUT)
    told.put((time.perf_counter() - began) / iterations)


def measured(lines: Lines, plan: Schedule, iterations: int = 2) -> float:
    """Seconds of one iteration of this schedule between processes."""
    n, context = len(lines.delay), multiprocessing.get_context("fork")
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in listeners]
    gate, told = context.Barrier(n), context.Queue()
    some = [context.Process(target=_run, args=(m, lines, listeners[m], ports, plan, iterations, gate, told))
            for m in range(n)]
    for p in some:
        p.start()
    try:
        return max(told.get(timeout=TIMEOUT) for _ in some)
    except queue.Empty:
        raise RunError(f"not all of {n} machines said within {TIMEOUT:g} s what an iteration took") from None
    finally:
        for p in some:
            p.join(5)
            if p.is_alive():
                p.kill()
        for s in listeners:
            s.close()


def main() -> None:
    """Random schedules and the one that is found, on three networks."""
    table = Table("network", "schedule", "cost model, s", "measured, s", "ratio")
    for seed in range(3):
        lines, rng = world(seed), np.random.default_rng(seed)
        plans = {f"random {i}": cost(lines, groups_of(rng.permutation(np.repeat(np.arange(4), 2)), 4)) for i in (1, 2)}
        for name, plan in {**plans, "found": search(lines, 4, 2, seed=seed)}.items():
            seconds = measured(lines, plan)
            table.add_row(str(seed), name, f"{plan.seconds:.3f}", f"{seconds:.3f}", f"{seconds / plan.seconds:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

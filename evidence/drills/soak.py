"""A long run under random harm: what it loses, and whether anything leaks, hangs or grows."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from evidence.drills.faults import LOSSY, drill, kill, rounds
from fedllm.federation.nvflare.loopback import Loopback, events, until

log = logging.getLogger(__name__)
VICTIMS: Mapping[str, Callable[[Loopback, str], int | None]] = {
    "worker": lambda rig, site: rig.worker(site),
    "client": lambda rig, site: next(iter(rig.processes("client_train", site)), None),
    "coordinator": lambda rig, site: rig.coordinator()}
"""Which process of the federation, or of a site, may be killed."""


def soak(rig: Loopback, total: int = 200, every: int = 20, seed: int = 0) -> dict[str, Any]:
    """So many rounds, and after each `every` of them one process, drawn by chance, is killed.

    `held`: open descriptors and memory of the processes that live from the first round to the last, when the first kill
    is due and when the last one is. `left`: processes that outlive the run and its sites by 30 seconds.
    """
    rng, kills, held = random.Random(seed), Counter[str](), list[dict[str, dict[str, int]]]()

    def harm(run: Path) -> float:
        for due in range(every, total, every):
            until(lambda due=due: rounds(run) >= due, 400, f"round {due} of {run}")
            held.append(_held(rig))
            kind, site = rng.choice(sorted(VICTIMS)), rng.choice(rig.sites)
            before = len(events(run, "resumed"))
            kill(until(lambda kind=kind, site=site: VICTIMS[kind](rig, site), 100, f"a {kind} of {site}"))
            kills[kind] += 1
            if kind == "coordinator":
                until(lambda before=before: len(events(run, "resumed")) > before, 200, "the run's going on")
        return 0.0

    found = drill(rig, harm, {**LOSSY, "rounds": total}, seconds=600.0)
    for site in list(rig.joins):
        rig.leave(site)
    gone = psutil.wait_procs([psutil.Process(p) for p in rig.all_processes() if psutil.pid_exists(p)], timeout=30)
    return {**found, "kills": dict(sorted(kills.items())), "left": len(gone[1]),
            "held": {name: [held[0][name], held[-1][name]] for name in held[0]}}


def _held(rig: Loopback) -> dict[str, dict[str, int]]:
    assert rig.serving is not None
    pids = {"serve": rig.serving.pid, "server": until(rig.server, 60, "the server's process"),
            **{f"join of {site}": join.pid for site, join in rig.joins.items()}}
    return {name: {"descriptors": (p := psutil.Process(pid)).num_fds(), "mb": p.memory_info().rss >> 20}
            for name, pid in pids.items()}


def steady(rig: Loopback, total: int = 1000, first: int = 100, step: int = 100) -> dict[str, Any]:
    """So many rounds without harm, and what the coordinator's process holds after `first` of them and on from there."""
    held: dict[int, float] = {}

    def look(run: Path) -> float:
        for due in range(first, total, step):
            until(lambda due=due: rounds(run) >= due, 400, f"round {due} of {run}")
            held[due] = psutil.Process(until(rig.coordinator)).memory_info().rss / 2**20
            log.info("%d rounds: %.1f MB", due, held[due])
        return 0.0

    spec = {**LOSSY, "rounds": total, "method": "fedavg", "record": {"checkpoint_every": 10},
            "local": {"optimizer": "sgd", "lr": 0.01, "steps": 1, "batch_size": 1}}
    found = drill(rig, look, spec, seconds=400.0)
    mb = list(held.values())
    return {"rounds": found["rounds"], "run_s": found["run_s"], "answers_lost": found["answers_lost"],
            "coordinator_mb": {str(n): round(v, 1) for n, v in held.items()}, "grown": round(max(mb) / mb[0] - 1, 4)}

"""Drills: one fault each, done to the real processes of a loopback federation, by pid. What it cost comes back.

`DRILLS[name](rig)` runs a recipe under `fedllm serve`, does the harm, and returns `recover_s` (from the harm, or from
its end where it lasts, until work goes on as before), whose answers were `missing`, and whether the result is the
`same` as the undisturbed run's. A drill raises TimeoutError when something hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evidence.drills.far_network import ip
from fedllm.api import run as simulate
from fedllm.core.errors import RunError
from fedllm.federation.nvflare.loopback import Loopback, events, until
from fedllm.methods.registry import method_class
from fedllm.runs.result import Result

LOCAL = {"optimizer": "sgd", "lr": 0.1, "steps": 15, "batch_size": 4}
WHOLE: dict[str, Any] = {"rounds": 6, "local": LOCAL}
"""SCAFFOLD, whose clients remember. It has no deadline, so nothing may be lost."""
LOSSY: dict[str, Any] = {"rounds": 16, "local": LOCAL, "clients": {"deadline": 30.0, "quorum": 1},
                         "evaluate": {"exact_match": False, "samples": 0, "clients": False}}
"""Rounds end without the sites that are away."""
PRETRAINING: dict[str, Any] = {"rounds": 8, "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 15, "batch_size": 4}}
"""Outer momentum at the server, Adam's moments at the sites (streaming_diloco: what they hold, and their own weights):
all of it must be there again."""
ASYNC: dict[str, Any] = {"method": "fedbuff", "knobs": {"buffer_size": 2, "concurrency": 3}, "rounds": 14,
                         "local": LOCAL, "evaluate": {"exact_match": False, "samples": 0, "clients": False}}
"""FedBuff: steps end while sites are at work, and who answers first decides, so that no two runs need be alike."""

Harm = Callable[[Path], float]
"""Hurts the run in this folder while it goes on; gives the seconds that recovery took."""


def drill(rig: Loopback, harm: Harm, spec: dict[str, Any], seconds: float = 400.0) -> dict[str, Any]:
    """Serve a run (of SCAFFOLD, if the spec names no method), harm it, and tell what came of it."""
    recipe, began = rig.recipe(**{"method": "scaffold", **spec}), time.monotonic()
    run = rig.run_folder(recipe)
    rig.serve(run, "--wait", "200")
    recovered = harm(run)
    until(lambda: rig.serving is not None and rig.serving.poll() is not None, seconds, f"the end of {run}")
    if not (run / "result.json").exists():
        raise RunError(f"{run} has no result; serve said: {(rig.folder / 'serve.log').read_text()[-600:]}")
    far, gone = Result.load(run), events(run, "missing")
    calm = f"state after {recipe['rounds']} calm rounds of {recipe['method']['name']}"
    apart = "clients" in spec or method_class(recipe["method"]["name"]).by_arrival
    if not apart and calm not in rig.notes:
        rig.notes[calm] = simulate(recipe, root=rig.folder / "here").state_digest
    return {"recover_s": round(recovered, 1), "run_s": round(time.monotonic() - began, 1), "rounds": far.rounds,
            "skipped": len(far.skipped), "missing": sorted({e["client"] for e in gone}), "answers_lost": len(gone),
            "why": sorted({str(e["why"]) for e in gone}), "back": sorted({e["client"] for e in events(run, "back")}),
            "same": None if apart else far.state_digest == rig.notes[calm]}


def rounds(run: Path) -> int:
    """Rounds that the record has."""
    return len(events(run, "round"))


def from_now_until(condition: Callable[[], Any], seconds: float = 300.0, what: str = "") -> float:
    """Seconds until the condition holds."""
    began = time.monotonic()
    until(condition, seconds, what)
    return time.monotonic() - began


def _next_round(run: Path) -> float:
    """Seconds until a further round is done."""
    had = rounds(run)
    return from_now_until(lambda: rounds(run) > had, what=f"round {had + 1} of {run}")


def _next_after_resumption(run: Path) -> float:
    """Seconds until the run was taken up again and a further round is done."""
    began = time.monotonic()
    until(lambda: events(run, "resumed"), 300, "the run's going on")
    _next_round(run)
    return time.monotonic() - began


def kill(pid: int) -> None:
    """End a process at once; one that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def client_killed(rig: Loopback) -> dict[str, Any]:
    """A site's process is killed in the middle of a round."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 2, 200)
        time.sleep(0.2)
        kill(until(lambda: rig.worker("site-b")))
        return _next_round(run)

    return drill(rig, harm, WHOLE)


def client_silent(rig: Loopback) -> dict[str, Any]:
    """A site's process stops answering (SIGSTOP) beyond a deadline, and goes on later."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 2, 200)
        pid = until(lambda: rig.worker("site-c"))
        os.kill(pid, signal.SIGSTOP)
        until(lambda: events(run, "missing"), 60)
        _next_round(run)
        os.kill(pid, signal.SIGCONT)
        return from_now_until(lambda: events(run, "back"), what="site-c taken back")

    return drill(rig, harm, LOSSY)


@contextlib.contextmanager
def in_turns(pid: int, still: float, going: float) -> Iterator[None]:
    """A process that stands still and goes on by turns while the block runs."""
    over = threading.Event()

    def turn() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(still)
                os.kill(pid, signal.SIGCONT)
                over.wait(going)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(still + going + 5)


def client_slow(rig: Loopback) -> dict[str, Any]:
    """A site works at a third of its speed to the end of the run."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 1, 200)
        with in_turns(until(lambda: rig.worker("site-a")), 0.2, 0.1):
            until(lambda: (run / "result.json").exists(), 300, "the end of a run with a slow site")
        return 0.0

    return drill(rig, harm, WHOLE)


def client_flapping(rig: Loopback) -> dict[str, Any]:
    """A site falls silent for 8 seconds out of 10, four times, and is killed in between."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 1, 200)
        for i in range(2):
            with in_turns(until(lambda: rig.worker("site-b")), 8.0, 2.0):
                time.sleep(19.0)
            if i == 0 and (pid := rig.worker("site-b")):
                kill(pid)
        return 0.0 if (run / "result.json").exists() else _next_round_or_end(run)

    return drill(rig, harm, {**WHOLE, "rounds": 12})


def _next_round_or_end(run: Path) -> float:
    had = rounds(run)
    return from_now_until(lambda: rounds(run) > had or (run / "result.json").exists(), what="a flapping site's round")


def half_gone(rig: Loopback) -> dict[str, Any]:
    """Two of three organisations' `fedllm join` are killed; they come back later."""
    away = {"site-b", "site-c"}

    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 2, 200)
        for site in sorted(away):
            kill(rig.joins[site].pid)
            rig.joins.pop(site).wait(10)
        left = from_now_until(lambda: not any(rig.processes("", s) for s in away), 30,
                              "the end of what killed sites had started")
        rig.notes["leaves_nothing_behind_s"] = round(left, 1)
        until(lambda: {e["client"] for e in events(run, "missing")} >= away, 120)
        for site in sorted(away):
            rig.join(site)
        return from_now_until(lambda: {e["client"] for e in events(run, "back")} >= away, what="two sites taken back")

    return drill(rig, harm, {**LOSSY, "rounds": 40})


def _kill_and_await(run: Path, whom: Callable[[], int | None]) -> float:
    """Kill a process after three rounds; when the round after its successor's resumption ended."""
    until(lambda: rounds(run) >= 3, 200)
    kill(until(whom))
    return _next_after_resumption(run)


def server_killed(rig: Loopback) -> dict[str, Any]:
    """NVFlare's server is killed; `fedllm serve` starts it again by itself."""
    return drill(rig, lambda run: _kill_and_await(run, rig.server), WHOLE)


def coordinator_killed(rig: Loopback) -> dict[str, Any]:
    """The process that drives the run is killed; `fedllm serve` starts it again by itself."""
    return drill(rig, lambda run: _kill_and_await(run, rig.coordinator), WHOLE)


def async_slow(rig: Loopback) -> dict[str, Any]:
    """Under FedBuff a site stands still for three server steps in the middle of its work; its answer counts later."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 2, 200)
        pid = until(lambda: rig.worker("site-c"))
        os.kill(pid, signal.SIGSTOP)
        until(lambda: not _answers_in_last(run, "site-c", 3), 50, "three steps without site-c")
        os.kill(pid, signal.SIGCONT)
        return from_now_until(lambda: _answers_in_last(run, "site-c", 1), 60, "an answer of site-c")

    return drill(rig, harm, {**ASYNC, "rounds": 60})


def _answers_in_last(run: Path, site: str, count: int) -> bool:
    """Whether the site answered in the last `count` rounds."""
    last = [e["round"] for e in events(run, "round")][-count:]
    return any(e["client"] == site and e["round"] in last for e in events(run, "answered"))


def async_killed(rig: Loopback) -> dict[str, Any]:
    """The process that drives a run of FedBuff is killed while sites are at work: those answers are dropped."""
    return drill(rig, lambda run: _kill_and_await(run, rig.coordinator), {**ASYNC, "rounds": 20})


def diloco_killed(rig: Loopback) -> dict[str, Any]:
    """Pre-training by DiLoCo: a worker is killed in the middle of a round, and later the coordinator."""
    return drill(rig, lambda run: _worker_then_coordinator(rig, run), {**PRETRAINING, "method": "diloco"})


def streaming_killed(rig: Loopback) -> dict[str, Any]:
    """The same to streaming DiLoCo, whose workers are told steps alone and hold the rest."""
    knobs = {"fragments": 2, "delay": 2}
    return drill(rig, lambda run: _worker_then_coordinator(rig, run),
                 {**PRETRAINING, "method": "streaming_diloco", "knobs": knobs})


def _worker_then_coordinator(rig: Loopback, run: Path) -> float:
    until(lambda: rounds(run) >= 2, 200)
    time.sleep(0.2)
    kill(until(lambda: rig.worker("site-b")))
    had = rounds(run)
    until(lambda: rounds(run) >= had + 2, 200, "rounds after the worker was killed")
    kill(until(rig.coordinator))
    return _next_after_resumption(run)


def all_killed(rig: Loopback) -> dict[str, Any]:
    """Every process of the federation is killed at once, as by a power cut; then the commands are typed again."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 3, 200)
        for pid in rig.all_processes():
            kill(pid)
        for process in (*rig.joins.values(), rig.serving):
            assert process is not None
            process.wait(10)
        for site in rig.sites:
            rig.join(site)
        rig.serve(run, "--wait", "200")
        return _next_after_resumption(run)

    return drill(rig, harm, WHOLE)


def partition(rig: Loopback) -> dict[str, Any]:
    """The line to a site in a network namespace of its own is cut for 25 s; the rig's host is `HOST`."""
    def harm(run: Path) -> float:
        until(lambda: rounds(run) >= 2, 200)
        ip("link", "set", "fedllm0", "down")
        until(lambda: events(run, "missing"), 90, "a round that ends without the site that is cut off")
        time.sleep(25)
        ip("link", "set", "fedllm0", "up")
        return from_now_until(lambda: events(run, "back"), what="the site behind the cut taken back")

    return drill(rig, harm, {**LOSSY, "rounds": 30})


DRILLS: dict[str, Callable[[Loopback], dict[str, Any]]] = {
    "client_killed": client_killed, "client_silent": client_silent, "client_slow": client_slow,
    "client_flapping": client_flapping, "half_gone": half_gone, "server_killed": server_killed,
    "coordinator_killed": coordinator_killed, "diloco_killed": diloco_killed, "streaming_killed": streaming_killed,
    "all_killed": all_killed, "async_slow": async_slow, "async_killed": async_killed}
"""All but `partition`, which needs a rig of its own."""

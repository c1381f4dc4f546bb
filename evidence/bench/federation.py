"""Measure real federations on this machine: `python -m evidence.bench.federation digests faults speed size soak`.

Every process is real and every line is mutual TLS over loopback. docs/results/federation.json keeps what was found, and
federation.md shows it. Other engines add rows to the same digest table (`keep("digests", method, {engine: ...})`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from evidence.bench import flower as bench_flower
from evidence.bench.rig_rows import TASKS, acting, by_rig
from evidence.bench.rows import Row, machine, row
from evidence.drills.far_network import HOST, namespace
from evidence.drills.faults import DRILLS, partition
from evidence.drills.soak import soak as soaked
from evidence.drills.soak import steady
from evidence.pages import federation as federation_page
from fedllm.api import run as simulate
from fedllm.core.card import Trial
from fedllm.core.errors import FedLLMError, RunError
from fedllm.federation.nvflare import serve as federate
from fedllm.federation.nvflare.line import SLOWEST
from fedllm.federation.nvflare.loopback import JOINING, QUICK, Loopback, events, loopback, until
from fedllm.federation.process import stoppable
from fedllm.methods.registry import METHODS, make_method, method_class
from fedllm.runs.complaints import edit

log = logging.getLogger(__name__)
OUT = Path("docs/results/federation.json")
SIZES = (200_000_000,)
BIG = 2_500_000_000


def tried(rig: Any, method: str) -> dict[str, Any]:
    """The rig's recipe for a method, with what the method says it is tried with."""
    trial = method_class(method).trial
    made, read = make_method(method, **trial.knobs), TASKS[trial.task]
    public = {"public": str(rig.folder / "public.jsonl")} if made.public_at() else {}
    clients = {"clients": {"ranks": list(trial.ranks)}} if trial.ranks else {}
    local = {"local": {"steps": 2, "batch_size": 4, **trial.local}} if trial.local else {}
    named = {name: {"name": rig.model, "task": trial.models.get(name, "generation"), "space": {"name": "lora"}}
             for name in (*made.asks_for(), *made.server_asks_for())}
    models = {"models": named} if named else {}
    more = {**{k: v for k, v in read.items() if k != "data"}, **local, **clients, **models}
    spec = rig.recipe(method, knobs=trial.knobs, data={**read.get("data", {}), **public}, space=dict(trial.space),
                      **more)
    if trial.acts:
        scene = {k: v for k, v in trial.acts.items() if k != "source"}
        spec["data"] = {"source": trial.acts["source"], "environment": {"clients": len(rig.sites), **scene}}
    for key, value in trial.far.items():
        edit(spec, key, value)
    return spec


def digests(out: Path = OUT, only: Sequence[str] = ()) -> None:
    """Each method of the registry in one process and on NVFlare: the digests of the final state, and the bytes."""
    for some, more in by_rig(only or list(METHODS)):
        with _rig(**more) as rig, rig.serving_session():
            for method in some:
                keep("digests", method, {"nvflare": _digest(rig, method)}, out)


def _digest(rig: Loopback, method: str) -> dict[str, Any]:
    if apart := _apart(method_class(method).trial):
        return {"same": None, "why": f"not tried on these rows: {apart}"}
    spec = tried(rig, method)
    if make_method(**spec["method"]).simulation_only:
        try:
            rig.run(spec)
        except FedLLMError as why:
            return {"same": None, "why": str(why)}
        return {"same": False, "why": "ran, though it can only be simulated"}
    try:
        here = simulate(spec, root=rig.folder / "here")
    except FedLLMError as why:
        return {"same": None, "why": str(why)[:300]}
    try:
        with acting(rig, spec):
            far = rig.run(spec)
    except FedLLMError as why:
        return {"same": False, "why": str(why)[:300]}
    loads = json.loads((far.folder / "sites.json").read_text())
    mine, theirs = (r.evaluation.get("clients") or {} for r in (here, far))
    return {"same": far.state_digest == here.state_digest, "digest": far.state_digest[:16],
            "clients_same": mine == theirs if mine or theirs else None,  # a method may have none of its clients'
            "bytes_same": far.bytes == here.bytes, "up": far.bytes["up"], "down": far.bytes["down"],
            "model_loads": sorted({s["loads"] for s in loads.values()}), "seconds": round(far.seconds, 1)}


def _apart(trial: Trial) -> str:
    """Why a method cannot be tried on the rig's rows; empty where it can, or says itself what it is tried with here."""
    return "" if trial.acts or trial.far else trial.apart


def faults(out: Path = OUT, only: Sequence[str] = ()) -> None:
    """Each drill once, on one federation; a drill that hangs or loses a run is a row that says so."""
    names = only or (*DRILLS, "partition")
    if any(n != "partition" for n in names):
        with _rig() as rig:
            for name in names:
                if name in DRILLS:
                    keep("faults", name, _drilled(lambda name=name: DRILLS[name](rig)), out)
            if "leaves_nothing_behind_s" in rig.notes:
                keep("faults", "processes left by a killed join", {"recover_s": rig.notes["leaves_nothing_behind_s"]},
                     out)
    if "partition" in names:
        keep("faults", "partition", _drilled(_partition), out)


def soak(out: Path = OUT) -> None:
    """Two hundred rounds with random kills: what was lost, and whether anything leaks or grows."""
    with _rig() as rig:
        keep("soak", "200 rounds", _drilled(lambda: soaked(rig)), out)


def memory(out: Path = OUT) -> None:
    """A thousand rounds without harm: whether the coordinator's process grows."""
    with _rig(sites=("site-a",)) as rig:
        keep("memory", "1000 rounds", _drilled(lambda: steady(rig)), out)


def _partition() -> dict[str, Any]:
    with namespace() as inside, _rig(join=False, host=HOST) as rig:
        for site in rig.sites:
            rig.join(site, inside=inside if site == rig.sites[-1] else ())
        return partition(rig)


def _drilled(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except (FedLLMError, TimeoutError, OSError) as error:
        log.warning("%s", error)
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def speed(out: Path = OUT) -> list[Row]:
    """An empty round to three sites, 200 MB one way, and LoRA rounds with one load of the model a site."""
    with _rig() as rig, rig.serving_session():
        line = _line(rig, SIZES)
        spec = rig.recipe("fedavg", name="lora", rounds=10, local={"lr": 1e-2, "steps": 5, "batch_size": 4},
                          evaluate={"exact_match": False, "samples": 0, "clients": False})
        far = rig.run(spec)
        loads = json.loads((far.folder / "sites.json").read_text())
        took = [e["seconds"] for e in events(far.folder, "round")]
    rows = [
        row("federation/no-op round of 3 sites, median", line["noop_round"]["median"] * 1e3, "ms", "", 20, least=True),
        row("federation/no-op round of 3 sites, least", line["noop_round"]["least"] * 1e3, "ms", "", 20, least=True),
        row("federation/200 MB one way", line[str(SIZES[0])]["one_way"], "s", "Flower: 4.2 s", 1, least=True),
        row("federation/200 MB there and back", line[str(SIZES[0])]["there_and_back"], "s", "Flower: 6.2 s"),
        row("federation/LoRA round of 3 sites, median", sorted(took)[len(took) // 2], "s", "", rounds=len(took)),
        row("federation/model loads a site in that run", max(s["loads"] for s in loads.values()), "", "stock Flower: "
            "one a call", 1, least=True)]
    for r in rows:
        keep("speed", r["name"].partition("/")[2], r, out)
    return rows


def size(out: Path = OUT, bytes_: int = BIG) -> None:
    """One update of `bytes_` to a site and back, and the most memory that each process has held."""
    with _rig(sites=("site-a",)) as rig, rig.serving_session(), _peaks(rig) as peaks:
        line = _line(rig, (bytes_,))
    found = {"bytes": bytes_, **line[str(bytes_)], "peak_rss": dict(peaks),
             "coordinator_before": line["memory_before_bytes"]}
    keep("size", f"{bytes_ / 1e9:g} GB", found, out)


def _line(rig: Loopback, sizes: Sequence[int]) -> dict[str, Any]:
    run = rig.run_folder(rig.recipe("fedavg", name="bench"))
    federate.await_sites(rig.session, len(rig.sites), JOINING)
    job = federate.submit(rig.session, run, len(rig.sites), QUICK, bench=list(sizes))
    until(lambda: str(rig.session.get_job_status(job)).startswith("FINISHED"), 500 + 12 * sum(sizes) / SLOWEST,
          "the measurement")
    if not (run / "bench.json").exists():
        raise RunError(f"the line could not be measured; see {rig.keys.kit('server') / 'process.log'}")
    return json.loads((run / "bench.json").read_text())


@contextlib.contextmanager
def _peaks(rig: Loopback) -> Iterator[dict[str, int]]:
    """The most resident memory (VmHWM) of each process of the federation, as far as it was seen."""
    kinds = {"server": ("server_train", "server"), "coordinator": ("runner_process", "server"),
             "join": ("client_train", rig.sites[0]), "site": ("worker_process", rig.sites[0])}
    peaks, over = dict[str, int](), threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            for name, (word, kit) in kinds.items():
                for pid in rig.processes(word, kit):
                    with contextlib.suppress(OSError, psutil.Error, StopIteration):
                        status = Path(f"/proc/{pid}/status").read_text().splitlines()
                        peak = int(next(x for x in status if x.startswith("VmHWM")).split()[1]) * 1024
                        peaks[name] = max(peaks.get(name, 0), peak)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join(10)


@contextlib.contextmanager
def _rig(**more: Any) -> Iterator[Loopback]:
    with tempfile.TemporaryDirectory(prefix="fedllm-federation-", ignore_cleanup_errors=True) as folder, \
            loopback(Path(folder).resolve(), **more) as rig:
        yield rig


def flower(out: Path = OUT, only: Sequence[str] = ()) -> None:
    """Each method of the registry in one process and on Flower, for the same table."""
    for some, more in by_rig(only or list(METHODS)):
        with bench_flower.rig(**more) as rig:
            for method in some:
                keep("digests", method, {"flower": _digest(rig, method)}, out)


def flower_speed(out: Path = OUT) -> list[Row]:
    """What `speed` asks of NVFlare, of Flower, and its LoRA rounds against a stock Flower app."""
    rows = bench_flower.speed()
    for r in rows:
        keep("speed", r["name"].partition("/")[2], r, out)
    return rows


PARTS: dict[str, Callable[[Path], Any]] = {"digests": digests, "faults": faults, "speed": speed, "size": size,
                                           "soak": soak, "memory": memory, "flower": flower,
                                           "flower_speed": flower_speed}


def keep(table: str, name: str, value: Mapping[str, Any], out: Path = OUT) -> None:
    """Put one row into the file, beside what else is known of it, and write the tables for people anew."""
    doc: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    doc["machine"] = {k: v for k, v in machine().items() if k in ("cpu", "cores", "python", "torch")}
    rows = doc.setdefault(table, {})
    old = rows.get(name, {}) if table == "digests" else {}
    rows[name] = {**old, **value, "measured": time.strftime("%Y-%m-%d"), "load": machine()["load"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(doc, indent=1) + "\n")
    out.with_suffix(".md").write_text(federation_page.tables(doc))


def federation() -> list[Row]:
    """All parts; the rows of speed are the bench's."""
    for part in (digests, flower, faults, size, soak):
        part()
    return [*speed(), *flower_speed()]


ROWED: dict[str, Callable[[Path, Sequence[str]], Any]] = {"digests": digests, "faults": faults, "flower": flower}


def main(words: Sequence[str] | None = None) -> None:
    """Measure the parts named on the command line (PART or PART:ROW,ROW), or all."""
    asked = [word.partition(":") for word in (sys.argv[1:] if words is None else words) or PARTS]
    for part, rows, _ in asked:
        if part not in (ROWED if rows else PARTS):
            sys.exit(f"bench federation: there is no part {part + rows!r}; allowed: {', '.join(PARTS)}; of "
                     f"{', '.join(ROWED)} some rows too, as {next(iter(ROWED))}:ROW,ROW")
    with stoppable():
        for part, _, only in asked:
            if only:
                ROWED[part](OUT, only.split(","))
            else:
                PARTS[part](OUT)


if __name__ == "__main__":
    main()

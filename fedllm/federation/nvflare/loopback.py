"""A federation of real processes on this machine, over mutual TLS: for benches, fault drills and tests.

Each site is a `fedllm join` of its own, the coordinator a `fedllm serve`, or a bare server and an administrator.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedllm.core.errors import RunFailed
from fedllm.engines.far.line import Patience
from fedllm.federation.nvflare import serve as federate
from fedllm.federation.nvflare.keys import new_federation
from fedllm.federation.process import end_tree, free_port
from fedllm.federation.settings import SETTINGS
from fedllm.methods.registry import method_class
from fedllm.runs.folder import RunFolder, fresh_path
from fedllm.runs.recipe import of_sites
from fedllm.runs.resolved import versions
from fedllm.runs.result import Result

SITES = ("site-a", "site-b", "site-c")
ROWS = (12, 15, 9)
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "good"]
QUICK = Patience(opening=200.0, probe=4.0, every=2.0, grace=300.0, revive=20.0)
JOINING = 400.0
"""Seconds for a server and its sites to start: half a minute of processor time, on a machine that others share."""
CLI = [sys.executable, "-m", "fedllm.cli.main"]


def write_rows(path: Path, k: int, n: int) -> None:
    """`n` made-up rows of client `k`, of 2 to 10 words."""
    def sentence(k: int, i: int) -> str:
        return " ".join(WORDS[(7 * i + 3 * k + j * (i + 1)) % len(WORDS)] for j in range(2 + (5 * i + k) % 9))

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": sentence(k, i), "response": sentence(k + 1, i), "label": ["even", "odd"][i % 2],
             "letter": "AB"[i % 2], "worse": sentence(k + 2, i + 1), "words": sentence(k, i).split(),
             "tags": ["O" if len(w) % 2 else "even" for w in sentence(k, i).split()]} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The run's events so far; a half-written last line is left for later."""
    path, out = run / "events.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return [e for e in out if kind in (None, e["kind"])]


def until(condition: Callable[[], Any], seconds: float = 150.0, what: str = "") -> Any:
    """Wait until the condition holds; its value. TimeoutError after `seconds`."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"not within {seconds:g} s: {what or condition}")


class Loopback:
    """Keys, rows and settings of three sites in one folder, and the processes that run on them."""

    def __init__(self, folder: Path, model: str = "embedded", host: str = "localhost",
                 sites: Sequence[str] = SITES, rows: Callable[[Path, int, int], None] = write_rows) -> None:
        """`rows` writes the file of client `k` with `n` rows."""
        self.folder, self.model, self.sites = folder, model, tuple(sites)
        for k, site in enumerate(sites):
            rows(folder / "data" / f"{site}.jsonl", k, ROWS[k % len(ROWS)])
        rows(folder / "test.jsonl", 9, 6)
        rows(folder / "public.jsonl", 10, 6)
        self.port = free_port()
        self.policy = folder / "policy.yaml"
        self.policy.write_text("text_leaves: true\nrows_may_change: true\ngate: {copies: report, personal: report}\n")
        self.keys: Any = self._keys(folder / "keys", host)
        self.address = f"{host}:{self.port}"
        self.joins: dict[str, subprocess.Popen[bytes]] = {}
        self.serving: subprocess.Popen[bytes] | None = None
        self.session: Any = None
        self.notes: dict[str, Any] = {}

    def _keys(self, folder: Path, host: str) -> Any:
        return new_federation(folder, self.sites, host=host, port=self.port)

    # -- what runs -----------------------------------------------------------------------------------------------------

    def recipe(self, method: str, **more: Any) -> dict[str, Any]:
        """A recipe over the sites' rows; in a simulation each file is a client of the same name."""
        knobs, data = more.pop("knobs", {}), more.pop("data", {})
        if "text" in method_class(method).card.kinds:
            more.setdefault("layers", [{"name": "responsible_gate", "copies": "report", "personal": "report"}])
        return {"name": method, "model": self.model, "method": {"name": method, **knobs},
                "space": {"name": "lora", "rank": 4}, "local": {"lr": 1e-2, "steps": 2, "batch_size": 4}, "rounds": 2,
                "data": {"source": str(self.folder / "data"), "partition": {"kind": "per_file"},
                         "test": str(self.folder / "test.jsonl"), **data},
                "evaluate": {"exact_match": False, "samples": 0}, "engine": "in_process", **more}

    def run_folder(self, recipe: Mapping[str, Any]) -> Path:
        """A run's folder, not begun yet."""
        checked = of_sites(recipe)
        path = fresh_path(self.folder / "far", checked.name)
        return RunFolder.create(path, {**checked.model_dump(mode="json"), "versions": versions()}).path

    def run(self, recipe: Mapping[str, Any], needed: int | None = None, patience: Patience = QUICK) -> Result:
        """The result of a run as a job of the server that `serving_session` holds."""
        return federate.carry_out(self.session, self.run_folder(recipe), needed or len(self.sites), JOINING, patience)

    # -- processes -----------------------------------------------------------------------------------------------------

    def join(self, site: str, *words: str, inside: Sequence[str] = ()) -> None:
        """Start `fedllm join` of this site, as its organisation would (`inside`: words before the command)."""
        told = ["join", self.address, "--data", str(self.folder / "data" / f"{site}.jsonl"),
                "--kit", str(self.keys.kit(site)), "--policy", str(self.policy), *words]
        if Path(self.model).exists():
            told += ["--models", self.model]
        self.joins[site] = self._start([*inside, *CLI, *told], f"{site}.log")

    def serve(self, run: Path, *words: str) -> subprocess.Popen[bytes]:
        """Start `fedllm serve` over a run's folder."""
        told = ["serve", str(run), "--federation", str(self.keys.folder), *words]
        self.serving = self._start([*CLI, *told], "serve.log")
        return self.serving

    def _start(self, words: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def processes(self, word: str, kit: str) -> list[int]:
        """Pids of NVFlare's processes of one kind (`client_train`, `worker_process`, ...) of one kit."""
        found = []
        for p in psutil.process_iter(["cmdline"]):
            line = p.info["cmdline"] or []
            if any(word in w for w in line) and str(self.folder / "keys" / "kits" / kit) in line:
                found.append(p.pid)
        return found

    def all_processes(self) -> list[int]:
        """Pids of everything that runs on this federation's kits."""
        kits = str(self.folder / "keys")
        return [p.pid for p in psutil.process_iter(["cmdline"]) if any(kits in w for w in p.info["cmdline"] or [])
                and p.pid != os.getpid()]

    def worker(self, site: str) -> int | None:
        """The site's process that holds the model, while a run is open there."""
        return next(iter(self.processes("worker_process", site)), None)

    def server(self) -> int | None:
        """NVFlare's server's main process."""
        return next(iter(self.processes("server_train", "server")), None)

    def coordinator(self) -> int | None:
        """The process that drives the run."""
        return next(iter(self.processes("runner_process", "server")), None)

    def leave(self, site: str) -> None:
        """Stop a site as Ctrl-C would."""
        join = self.joins.pop(site)
        join.terminate()
        try:
            join.wait(40)
        except subprocess.TimeoutExpired:
            end_tree(join.pid)

    @contextlib.contextmanager
    def serving_session(self) -> Iterator[None]:
        """A server that takes one job after the other, for `run`."""
        with federate.server(self.keys), federate.admin(self.keys, JOINING) as self.session:
            yield

    @contextlib.contextmanager
    def settings(self, site: str, **changed: Any) -> Iterator[None]:
        """The organisation edits its settings; they hold for the next run."""
        path, until = self.keys.kit(site) / "local" / SETTINGS, time.monotonic() + 60
        while not path.exists():  # `join` writes it, and may just have begun
            if time.monotonic() > until:
                raise RunFailed(f"{site} has written no settings in a minute; its log is {self.folder / f'{site}.log'}")
            time.sleep(0.1)
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **changed}))
        try:
            yield
        finally:
            path.write_text(before)

    def close(self) -> None:
        """End all that this federation started."""
        if self.serving is not None and self.serving.poll() is None:
            end_tree(self.serving.pid)
        for site in list(self.joins):
            self.leave(site)
        for pid in self.all_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def loopback(folder: Path, model: str = "embedded", join: bool = True, **more: Any) -> Iterator[Loopback]:
    """A federation whose sites have been started, until the block ends."""
    with joined(Loopback(folder, model, **more), join) as made:
        yield made


@contextlib.contextmanager
def joined(made: Any, join: bool) -> Iterator[Any]:
    """The federation, with its sites started (or not); all of its processes end with the block."""
    try:
        for site in made.sites if join else ():
            made.join(site)
        yield made
    finally:
        made.close()

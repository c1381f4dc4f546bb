"""Operating a federation: how a run stands, its figures for Prometheus, its logs, and stopping it.

Everything is read from the run's folder, so that it costs the run nothing and also works when the run has stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from fedllm.core.errors import RunError, RunFailed, plain
from fedllm.core.record import is_test
from fedllm.federation.academy.keys import KIT as ACADEMY_KIT
from fedllm.federation.flower.keys import KIT
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import read_recipe
from fedllm.runs.store import reading

SERVING = "serving.json"
"""In the run's folder while `fedllm serve` works on it: its pid, and when that process began."""
HELD = ".serving.lock"
COLOR = re.compile(r"\x1b\[[0-9;]*m")


class Tally:
    """Counts a run's events as they are written; each look reads only what is new."""

    def __init__(self, run: Path) -> None:
        self.run = RunFolder.open(run).path
        self.recipe = read_recipe(self.run / "recipe.yaml")
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self.at, self.rounds, self.seconds, self.resumed, self.skipped = 0, 0, 0.0, 0, 0
        self.bytes, self.missing, self.sites = Counter[str](), Counter[str](), dict[str, str]()
        self.refused = Counter[str]()
        self.why: dict[str, str] = {}
        self.stopped = self.nothing = ""

    def look(self) -> Tally:
        """Take in what was written since the last look; a record that was cut for a resumption is read afresh."""
        path = self.run / "events.jsonl"
        with self._lock:
            if not path.exists():
                return self
            if path.stat().st_size < self.at:
                self._begin()
            with path.open("rb") as file:
                file.seek(self.at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.at += len(line)
                    with reading(path):
                        self._count(json.loads(line))
        return self

    def _count(self, event: dict[str, Any]) -> None:
        kind, client = event["kind"], str(event.get("client", ""))
        if kind == "wire":
            if not is_test(event["phase"], event.get("purpose")):
                self.bytes[event["direction"]] += int(event["bytes"])
            self.sites.setdefault(client, "here")
        elif kind == "round":
            self.rounds, self.seconds, self.stopped = int(event["round"]) + 1, float(event["seconds"]), ""
            self.skipped += "skipped" in event
        elif kind in ("missing", "left_out", "suspect"):
            self.missing[client] += kind == "missing"
            self.sites[client] = {"missing": self.sites.get(client, "here"), "left_out": "left out"}.get(kind, kind)
            self.why[client] = plain(event.get("why", ""))
        elif kind == "refused":
            self.refused[client] += 1
            self.sites.setdefault(client, "here")
            self.why[client] = plain(event.get("why", ""))
        elif kind in ("back", "reopened"):
            self.sites[client] = "here"
        elif kind == "resumed":
            self.resumed, self.stopped = self.resumed + 1, ""
        elif kind == "did_nothing":
            self.nothing = str(event["why"])
        elif kind == "stopped":
            self.stopped = str(event["why"])

    @property
    def state(self) -> str:
        """finished, running, or why it stands."""
        if (self.run / "result.json").exists():
            return f"failed: {self.nothing}" if self.nothing else "finished"
        if serving(self.run):
            return "running"
        failed = self.run / "failed.txt"
        return f"stopped: {failed.read_text().strip() if failed.exists() else self.stopped or 'no process works on it'}"

    def as_json(self) -> dict[str, Any]:
        """How the run stands."""
        sites = {s: {"state": self.sites[s], "missing": self.missing[s], "refused": self.refused[s],
                     "why": self.why.get(s, "")}
                 for s in sorted(self.sites)}
        return {"run": str(self.run), "state": self.state, "method": self.recipe.method.name, "rounds": self.rounds,
                "of": self.recipe.rounds, "last_round_seconds": self.seconds, "resumed": self.resumed,
                "skipped": self.skipped, "up": self.bytes["up"], "down": self.bytes["down"], "sites": sites}

    def prometheus(self) -> str:
        """The same as figures in Prometheus's text format."""
        now, out = self.as_json(), list[str]()

        def figure(name: str, kind: str, says: str, values: dict[str, Any]) -> None:
            out.extend((f"# HELP fedllm_{name} {says}", f"# TYPE fedllm_{name} {kind}"))
            out.extend(f"fedllm_{name}{labels} {value}" for labels, value in values.items())

        figure("up", "gauge", "1 while a coordinator works on the run.", {"": int(now["state"] == "running")})
        figure("rounds_done", "gauge", "Rounds done.", {"": now["rounds"]})
        figure("rounds", "gauge", "Rounds of the whole run.", {"": now["of"]})
        figure("rounds_skipped_total", "counter", "Rounds that too few sites answered.", {"": now["skipped"]})
        figure("round_seconds", "gauge", "Seconds that the last round took.", {"": now["last_round_seconds"]})
        figure("resumptions_total", "counter", "Times that the run was taken up again.", {"": now["resumed"]})
        figure("wire_bytes_total", "counter", "Bytes of payloads, as the run's record counts them.",
               {f'{{direction="{way}"}}': now[way] for way in ("up", "down")})
        if now["sites"]:
            quoted = {s: s.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for s in now["sites"]}
            figure("site_here", "gauge", "1 while the site takes part.",
                   {f'{{site="{quoted[s]}"}}': int(v["state"] == "here") for s, v in now["sites"].items()})
            figure("site_missing_total", "counter", "Answers of the site that were missing.",
                   {f'{{site="{quoted[s]}"}}': v["missing"] for s, v in now["sites"].items()})
            figure("site_refused_total", "counter", "Answers of the site that were refused.",
                   {f'{{site="{quoted[s]}"}}': v["refused"] for s, v in now["sites"].items()})
        return "\n".join(out) + "\n"


@contextlib.contextmanager
def metrics(run: Path, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """`/metrics` and `/healthz` on this port while the block runs (0: a free one); gives the port."""
    tally = Tally(run)

    class Answer(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            text = {"/metrics": lambda: tally.look().prometheus(), "/healthz": lambda: "ok\n"}.get(self.path)
            body = (text() if text else "there are /metrics and /healthz\n").encode()
            self.send_response(200 if text else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not logged."""

    try:
        server = ThreadingHTTPServer((host, port), Answer)
    except OSError as error:
        raise RunError(f"metrics: port {port} cannot be opened: {error.strerror}") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def announced(run: Path) -> Iterator[None]:
    """Says in the run's folder that this process works on it; RunError when another one does."""
    room, me = RunFolder(run), psutil.Process()
    if other := serving(run):
        raise RunError(f"{run} is being served by process {other}; `fedllm stop {run}` ends it")
    with room.held(name=HELD):
        room.write_json(SERVING, {"pid": me.pid, "began": me.create_time()})
        try:
            yield
        finally:
            (run / SERVING).unlink(missing_ok=True)


def serving(run: Path) -> int | None:
    """The pid of the `fedllm serve` that works on this run; None when none does, whatever a killed one left, and
    whatever a folder that came from elsewhere names: the system knows who holds the lock."""
    if not RunFolder(run).is_held(HELD):
        return None
    try:
        said = json.loads((run / SERVING).read_text())
        process = psutil.Process(int(said["pid"]))
        alive = abs(process.create_time() - float(said["began"])) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process.pid if alive else None
    except (OSError, ValueError, KeyError, psutil.Error):
        return None


def stop(run: Path, wait: float = 60.0) -> int:
    """End the `fedllm serve` of this run, in order: its pid. RunError when there is none or it does not end."""
    RunFolder.open(run)
    pid = serving(run)
    if pid is None:
        raise RunError(f"nobody serves {run}")
    os.kill(pid, signal.SIGTERM)
    ends = time.monotonic() + wait
    while serving(run) == pid:
        if time.monotonic() > ends:
            raise RunFailed(f"process {pid} did not end within {wait:g} s")
        time.sleep(0.1)
    return pid


def log_lines(path: Path, last: int) -> list[str]:
    """The last lines of a run's events without single messages, or of each log in a kit (two on Flower)."""
    if (path / "recipe.yaml").exists():
        kept = [line for line in _tail(path / "events.jsonl") if '"kind":"wire"' not in line[:40]]
        return kept[-last:]
    if (path / "startup").is_dir():
        return _tail(path / "process.log")[-last:]
    if (path / ACADEMY_KIT).exists():
        return _tail(path / "process.log")[-last:]
    if (path / KIT).exists():
        logs = {log: _tail(path / log)[-last:] for log in ("supernode.log", "process.log")}
        return [f"{log}: {COLOR.sub('', line)}" for log, lines in logs.items() for line in lines if line.strip()]
    raise RunError(f"{path} is neither a run's folder nor a kit")


def _tail(path: Path, most: int = 1 << 22) -> list[str]:
    """The lines in the last 4 MB of a file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode(errors="replace").splitlines()

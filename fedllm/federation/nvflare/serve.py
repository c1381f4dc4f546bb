"""The coordinator's side on NVFlare: starts its server, submits the run as a job, and waits for its result."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.core.aside import started
from fedllm.core.errors import FedLLMError, RunError, RunFailed
from fedllm.engines.far.line import Patience
from fedllm.federation.answering import ASKING, Desk
from fedllm.federation.coordinator import FAILED
from fedllm.federation.nvflare.keys import ADMIN, NODES, Federation
from fedllm.federation.nvflare.process import kit_process
from fedllm.federation.process import need_port
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import log as progress
from fedllm.runs.result import Result, finished

log = logging.getLogger(__name__)
TRY = 20.0
"""Seconds for one try to log in, and to log out: NVFlare itself waits without an end for a connection that it has given
up while its server was starting."""
RESTARTS, PAUSE = 3, 5.0
"""Times in a row that a process that died is started again though the run came no round further; seconds before it."""


def serve_folder(run: Path, federation: Path, needed: int | None = None, wait: float = 600.0,
                 patience: Patience | None = None, desk: Desk | None = None) -> Result:
    """Begin the run in a folder, or go on with it, with a server that is started again when it dies; at `desk`
    questions are then answered, until this process ends."""
    keys = Federation(federation)
    needed = len(keys.spec["sites"]) if needed is None else needed
    need_port(int(keys.spec["port"]), "NVFlare's server")
    for _ in _starts(run, f"NVFlare's server (see {keys.kit('server') / 'process.log'})"):
        with server(keys) as process:
            try:
                with admin(keys, wait, lambda: process.poll() is None) as session:
                    for site in keys.spec.get("revoked", ()):
                        _tell(session.disable_client, site)
                    return carry_out(session, run, needed, wait, patience, lambda: process.poll() is None, desk)
            except ServerGone:
                log.warning("NVFlare's server ended with %s", process.poll())
    raise AssertionError("unreachable")


def _starts(run: Path, what: str) -> Iterator[None]:
    """Starts of something that dies, for as long as the run gets on between them; RunError when it does not."""
    done, vain = _rounds(run), 0
    while True:
        yield
        before, done = done, _rounds(run)
        vain = 0 if done > before else vain + 1
        if vain > RESTARTS:
            raise RunFailed(f"{what} ended {vain} times in a row, and the run came no round further")
        log.warning("%s ended too early; it is started again (%d of %d starts without a further round)", what, vain,
                    RESTARTS)
        time.sleep(PAUSE)


def _rounds(run: Path) -> int:
    return max(RunFolder.open(run).rounds(), default=0)


class ServerGone(RunError):
    """NVFlare's server's process has ended in the middle of a run: worth another start."""


def carry_out(session: Any, run: Path, needed: int, wait: float = 600.0, patience: Patience | None = None,
              alive: Callable[[], bool] = lambda: True, desk: Desk | None = None) -> Result:
    """A run (begun or not) as a job of a running server; the coordinator's process is started again when it dies.

    Raises ServerGone once the server itself is not `alive`.
    """
    for _ in _starts(run, "the coordinator's process (see the server kit's process.log)"):
        with _while_alive(alive):
            await_sites(session, needed, wait)
            (run / FAILED).unlink(missing_ok=True)
            (run / ASKING).unlink(missing_ok=True)
            job = submit(session, run, needed, patience or Patience(), desk=desk)
            if _follow(session, run, job, alive, (patience or Patience()).stalled, desk is not None):
                return finished(run)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _while_alive(alive: Callable[[], bool]) -> Iterator[None]:
    """NVFlare raises errors of many kinds when its server is gone; they all mean that."""
    try:
        yield
    except Exception as error:
        if alive():
            raise
        raise ServerGone(f"{type(error).__name__}: {error}") from None


@contextlib.contextmanager
def server(keys: Federation) -> Iterator[subprocess.Popen[bytes]]:
    """NVFlare's server while the block runs."""
    with kit_process(keys.kit("server"), "server", "fed_server.json", "org=coordinator") as process:
        yield process


@contextlib.contextmanager
def admin(keys: Federation, wait: float = 60.0, alive: Callable[[], bool] = lambda: True) -> Iterator[Any]:
    """A session of the federation's administrator with the running server; given up when that is not `alive`."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    ends, last = time.monotonic() + wait, "no try"
    session, at = None, (str(keys.spec["host"]), int(keys.spec["port"]))
    while session is None:
        try:
            socket.create_connection(at, 5.0).close()  # NVFlare's own tries take seconds each and are printed
            session = _in_time(lambda: new_secure_session(ADMIN, str(keys.kit("admin")), timeout=5.0),
                               lambda late: late.close())
        except Exception as error:  # NVFlare raises errors of many kinds while its server starts
            last = f"{type(error).__name__}: {error}"
            if not alive():
                raise RunFailed(f"the server ended as it began; see {keys.kit('server') / 'process.log'}") from None
            if time.monotonic() > ends:
                raise RunFailed(f"the server at {at[0]}:{at[1]} does not answer ({last})") from None
            time.sleep(0.5)
    try:
        yield session
    finally:
        try:
            _in_time(session.close)
        except TimeoutError as late:
            log.warning("the administrator's session is left open: %s", late)


def _in_time(work: Callable[[], Any], late: Callable[[Any], None] = lambda made: None) -> Any:
    """What comes of this, in a thread of its own; TimeoutError after `TRY` seconds, and `late` has what still comes."""
    found = started(work)
    try:
        return found.result(TRY)
    except TimeoutError:
        if found.done():  # it is the call's own
            raise
        found.add_done_callback(lambda f: None if f.exception() else late(f.result()))
        raise TimeoutError(f"NVFlare's own call has not come back in {TRY:g} s") from None


def await_sites(session: Any, needed: int, wait: float) -> list[str]:
    """The sites that have joined, once there are `needed`; RunError when that takes longer than `wait` seconds."""
    ends, before = time.monotonic() + wait, -1
    while True:
        have = sorted(c.name for c in session.get_system_info().client_info)
        if len(have) != before:
            progress.info("%d of %d sites are here (%s)", before := len(have), needed, ", ".join(have) or "none")
        if len(have) >= needed:
            return have
        if time.monotonic() > ends:
            raise RunFailed(f"{len(have)} of {needed} sites joined in {wait:g} s ({', '.join(have) or 'none'})")
        time.sleep(0.5)


def submit(session: Any, run: Path, needed: int, patience: Patience, bench: Sequence[int] = (),
           desk: Desk | None = None) -> str:
    """Submit the run as a job that names installed classes only; returns the job's id.

    With `bench` messages of these sizes are measured in place of the run.
    """
    args = {"folder": str(run), "needed": needed, "patience": asdict(patience), "bench": list(bench),
            "desk": desk and asdict(desk)}
    parts = {
        "meta.json": {"name": "fedllm", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}},
        "app/config/config_fed_server.json": {"format_version": 2, "components": [
            {"id": "_server", "path": f"{NODES}.CoordinatorNode", "args": args}], "workflows": [
            {"id": "controller", "path": f"{NODES}.Conductor", "args": {"server_obj_id": "_server"}}]},
        "app/config/config_fed_client.json": {"format_version": 2, "components": [
            {"id": "_client", "path": f"{NODES}.SiteNode", "args": {}}], "executors": [
            {"tasks": ["*"], "executor": {
                "id": "executor", "path": f"{NODES}.Resident", "args": {"client_obj_id": "_client"}}}]}}
    with tempfile.TemporaryDirectory() as temp:
        for name, value in parts.items():
            path = Path(temp) / "fedllm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        return str(session.submit_job(str(Path(temp) / "fedllm")))


def _follow(session: Any, run: Path, job: str, alive: Callable[[], bool], stalled: float, asked: bool = False) -> bool:
    """Wait for the job's end: True when the run is complete, False when its process died; RunError with its reason.

    A run may take days, so what is bounded is its silence: after `stalled` seconds without an event it is aborted. One
    that is `asked` questions is never complete, and may be silent while it takes them.
    """
    size, since, open_ = -1, time.monotonic(), False
    while True:
        if not alive():
            raise ServerGone("it ended while the run went on")
        over = str(session.get_job_status(job)).startswith("FINISHED")
        if (run / FAILED).exists():
            raise RunFailed((run / FAILED).read_text())
        if over:
            return (run / "result.json").exists() and not asked
        if asked and not open_ and (open_ := (run / ASKING).exists()):
            progress.info("questions are answered at %s", json.loads((run / ASKING).read_text())["url"])
        events = run / "events.jsonl"
        if (now := events.stat().st_size if events.exists() else 0) != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > stalled and not open_:
            log.warning("nothing has happened for %g s: the coordinator's process hangs and is ended", stalled)
            session.abort_job(job)
            return False
        time.sleep(0.5)


def suspend(keys: Federation, site: str, wait: float = 60.0) -> None:
    """The server refuses this site from now on, until `restore`."""
    with admin(keys, wait) as session:
        _tell(session.disable_client, site)


def suspend_if_running(keys: Federation, site: str) -> bool:
    """Whether a server runs, which then refuses this site from now on."""
    with contextlib.suppress(OSError):
        socket.create_connection((str(keys.spec["host"]), int(keys.spec["port"])), 3.0).close()
        suspend(keys, site)
        return True
    return False


def restore(keys: Federation, site: str, wait: float = 60.0) -> None:
    """A suspended site may join again."""
    with admin(keys, wait) as session:
        _tell(session.enable_client, site)


def _tell(command: Callable[[str], Any], site: str) -> None:
    try:
        command(site)
    except Exception as error:
        raise FedLLMError(f"the server refused for site '{site}': {error}") from None

"""A real federation in two lines: `serve` on the coordinator's machine, `join` on each organisation's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fedllm.app.federate_keys import ADMIN, NODES, Federation
from fedllm.app.federate_site import SETTINGS, SiteSettings, versions
from fedllm.app.folder import RunFolder, fresh_path
from fedllm.app.recipe import Recipe, load_recipe
from fedllm.app.result import Result
from fedllm.core.errors import FedLLMError, RecipeError, RunError
from fedllm.engines.flare_sites import Patience

log = logging.getLogger(__name__)
TRAIN = "nvflare.private.fed.app"
RESTARTS = 3
"""Times that a coordinator's process that died is started again by itself."""


def serve(recipe: str | Path | Mapping[str, Any] | Recipe, federation: str | Path, *, root: str | Path = "runs",
          needed: int | None = None, wait: float = 600.0, patience: Patience | None = None,
          **overrides: Any) -> Result:
    """Run a recipe in a real federation and come back with its result.

    `federation` is the folder made by `fedllm keys new`; `needed` sites (all of them by default) must have joined
    within `wait` seconds. Raises RecipeError before anything starts and RunError when the run cannot go on.
    """
    checked = load_recipe(recipe, overrides)
    folder = RunFolder.create(fresh_path(Path(root), checked.name),
                              {**checked.model_dump(mode="json"), "versions": versions()})
    return resume_serving(folder.path, federation, needed=needed, wait=wait, patience=patience)


def resume_serving(run: str | Path, federation: str | Path, *, needed: int | None = None, wait: float = 600.0,
                   patience: Patience | None = None) -> Result:
    """Go on with a federation's run, whatever was killed; it ends in the state of an undisturbed run."""
    room, keys = RunFolder.open(Path(run).resolve()), Federation(Path(federation).resolve())
    if (room.path / "result.json").exists():
        return Result.load(room.path)
    sites = keys.spec["sites"]
    needed = len(sites) if needed is None else needed
    with server(keys), admin(keys, wait) as session:
        for start in range(RESTARTS + 1):
            await_sites(session, needed, wait)
            (room.path / "failed.txt").unlink(missing_ok=True)
            submit(session, room.path, needed, patience or Patience())
            if _follow(session, room.path):
                return Result.load(room.path)
            log.warning("the coordinator's process died; start %d of %d", start + 2, RESTARTS + 1)
    raise RunError(f"the coordinator's process died {RESTARTS + 1} times; its log is in {keys.kit('server')}")


def join(address: str, data: str | Path, *, kit: str | Path, methods: Sequence[str] | None = None,
         models: Sequence[str] = (), store: str | Path | None = None, stop: Callable[[], bool] = lambda: False,
         **settings: Any) -> None:
    """Take part in a federation until stopped: this site's process, its data and its settings.

    `address` must be the one that the kit was made for. `settings` are `SiteSettings`, kept in the kit's local folder.
    """
    kit = Path(kit).resolve()
    target = _target(kit)
    if address != target:
        raise RecipeError(f"address {address!r}: the kit {kit} was made for {target!r}")
    mine = SiteSettings(data=str(Path(data).resolve()), store=str(Path(store or kit / "memory").resolve()),
                        methods=None if methods is None else list(methods),
                        models=[str(Path(m).resolve()) for m in models], **settings)
    (kit / "local" / SETTINGS).write_text(json.dumps(mine.model_dump(), indent=2))
    name = json.loads((kit / "startup" / "fed_client.json").read_text())["client"]["fqsn"]
    with _stoppable():
        while not stop():
            with _process(kit, "client", "fed_client.json", f"uid={name}", f"org={name.replace('-', '_')}") as process:
                while process.poll() is None and not stop():
                    time.sleep(0.2)
            if process.returncode == 0 or stop():
                return
            log.warning("the site's process ended with %s; it is started again", process.returncode)
            time.sleep(2.0)


def _target(kit: Path) -> str:
    try:
        return json.loads((kit / "startup" / "fed_client.json").read_text())["servers"][0]["service"]["target"]
    except OSError:
        raise RecipeError(f"{kit} is no site's kit (it has no startup/fed_client.json); ask the coordinator for the one "
                          "that `fedllm keys` made") from None


@contextlib.contextmanager
def server(keys: Federation) -> Iterator[None]:
    """NVFlare's server while the block runs."""
    with _process(keys.kit("server"), "server", "fed_server.json", "org=coordinator"):
        yield


@contextlib.contextmanager
def _process(kit: Path, side: str, config: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """One NVFlare main process; its own job processes end with it."""
    words = [sys.executable, "-u", "-m", f"{TRAIN}.{side}.{side}_train", "-m", str(kit), "-s", config, "--set",
             "secure_train=true", *more, "config_folder=config"]
    for left in ("shutdown.fl", "restart.fl", "pid.fl"):
        (kit / left).unlink(missing_ok=True)
    (kit / "transfer").mkdir(exist_ok=True)
    with (kit / "process.log").open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=kit, env={**os.environ, "MALLOC_ARENA_MAX": "4"})
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
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no child is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def admin(keys: Federation, wait: float = 60.0) -> Iterator[Any]:
    """A session of the federation's administrator with the running server."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    ends, last = time.monotonic() + wait, "no try"
    session = None
    while session is None:
        try:
            session = new_secure_session(ADMIN, str(keys.kit("admin")), timeout=5.0)
        except Exception as error:  # NVFlare raises many kinds while its server starts
            last = f"{type(error).__name__}: {error}"
            if time.monotonic() > ends:
                raise RunError(f"the server at {keys.spec['host']}:{keys.spec['port']} does not answer ({last})") from None
            time.sleep(0.5)
    try:
        yield session
    finally:
        session.close()


def await_sites(session: Any, needed: int, wait: float) -> list[str]:
    """The sites that have joined, once there are `needed`; RunError when that takes longer than `wait` seconds."""
    ends = time.monotonic() + wait
    while True:
        have = sorted(c.name for c in session.get_system_info().client_info)
        if len(have) >= needed:
            return have
        if time.monotonic() > ends:
            raise RunError(f"{len(have)} of {needed} sites joined in {wait:g} s ({', '.join(have) or 'none'})")
        time.sleep(0.5)


def submit(session: Any, run: Path, needed: int, patience: Patience) -> str:
    """Submit the run as a job that names installed classes only; returns the job's id."""
    args = {"folder": str(run), "needed": needed, "patience": asdict(patience)}
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


def _follow(session: Any, run: Path) -> bool:
    """Wait for the job's end: True when the run is complete, False when its process died; RunError with its reason."""
    while True:
        if (run / "result.json").exists():
            return True
        if (run / "failed.txt").exists():
            raise RunError((run / "failed.txt").read_text())
        jobs = session.list_jobs(limit=1, reverse=True)
        if jobs and str(jobs[0].get("status", "")).startswith("FINISHED"):
            time.sleep(0.5)
            if not (run / "failed.txt").exists():
                return (run / "result.json").exists()
        time.sleep(0.5)


def suspend(keys: Federation, site: str, wait: float = 60.0) -> None:
    """The server refuses this site from now on, until `restore`."""
    with admin(keys, wait) as session:
        _tell(session.disable_client, site)


def restore(keys: Federation, site: str, wait: float = 60.0) -> None:
    """A suspended site may join again."""
    with admin(keys, wait) as session:
        _tell(session.enable_client, site)


def _tell(command: Callable[[str], Any], site: str) -> None:
    try:
        command(site)
    except Exception as error:
        raise FedLLMError(f"the server refused for site '{site}': {error}") from None

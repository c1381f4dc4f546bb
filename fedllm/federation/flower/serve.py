"""The coordinator's side of a Flower federation: `serve` starts a SuperLink, enters the run, and drives it itself.

The run is an ordinary Flower run with an app that is only a name. Its ServerApp task is taken by this process (as any
SuperExec would take it), which then has the Grid of the run.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunFailed
from fedllm.engines.far.line import Patience
from fedllm.federation.coordinator import drive_run
from fedllm.federation.flower.internals import check_flower, fab, gentle, hasten_pulls, inside, keep_alive, runtime
from fedllm.federation.flower.join import watched
from fedllm.federation.flower.keys import FlowerFederation
from fedllm.federation.flower.link import FlowerLink
from fedllm.federation.flower.wire import read
from fedllm.federation.process import end_tree, need_port
from fedllm.runs.progress import log as progress
from fedllm.runs.result import Result

log = logging.getLogger(__name__)
START = 60.0
"""Seconds in which the SuperLink must answer."""
WAITS = Patience(probe=6.0, grace=90.0)
"""A SuperNode hands on one message at a time, so a sign of life may wait behind a long one."""


def serve_folder(run: Path, federation: Path, needed: int | None = None, wait: float = 600.0,
                 patience: Patience | None = None) -> Result:
    """Begin the run in a folder, or go on with it: a SuperLink for as long as it takes."""
    keys = FlowerFederation(federation)
    need_port(int(keys.spec["port"]), "Flower's SuperLink")
    with superlink(keys) as nodes:
        return carry_out_flower(keys, nodes, run, needed, wait, patience)


def carry_out_flower(keys: FlowerFederation, nodes: Mapping[str, int], run: Path, needed: int | None = None,
                     wait: float = 600.0, patience: Patience | None = None) -> Result:
    """A run on a SuperLink that is up, with the sites that are there once `needed` are."""
    nodes = {site: node for site, node in nodes.items() if not keys.barred(site)}
    needed = len(nodes) if needed is None else needed
    with flower_run(keys) as grid:
        here = await_nodes(grid, nodes, needed, wait)
        link = FlowerLink(grid, {site: nodes[site] for site in here}, keys.barred)
        try:
            return drive_run(run, link, here, needed, patience or WAITS, kind="flower")
        finally:
            link.close()


@contextlib.contextmanager
def superlink(keys: FlowerFederation) -> Iterator[dict[str, int]]:
    """Flower's SuperLink while the block runs (TLS, node authentication); gives the node id of each site."""
    check_flower()
    spec, own = keys.spec, keys.folder / "server"
    words = ["fedllm.federation.flower.superlink", "--ssl-ca-certfile", str(own / "ca.crt"), "--ssl-certfile",
             str(own / "server.crt"), "--ssl-keyfile", str(own / "server.key"), "--enable-supernode-auth",
             "--isolation", "process", "--host", "0.0.0.0", "--port", str(spec["port"]),
             "--superexec-auth-secret-file", str(own / "secret"), "--disable-runtime-dependency-installation"]
    with (keys.folder / "superlink.log").open("ab") as out:
        process = watched(words, out, own)
    try:
        yield register(keys, process)
    finally:
        end_tree(process.pid)
        process.wait(30)


def register(keys: FlowerFederation, process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Make the sites' keys known to a SuperLink that is starting; their node ids."""
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    own = inside()
    client, ends, nodes = control(keys), time.monotonic() + START, dict[str, int]()
    todo = dict(keys.spec["sites"])
    while todo:
        site, text = next(iter(todo.items()))
        public: Any = load_ssh_public_key(text.encode())
        try:
            request = own.RegisterNodeRequest(public_key=own.public_key_to_bytes(public))
            nodes[site] = client.RegisterNode(request).node_id
            del todo[site]
        except Exception as error:
            if process.poll() is not None:
                raise RunFailed(f"the SuperLink ended as it began; see {keys.folder / 'superlink.log'}") from None
            if time.monotonic() > ends:
                raise RunFailed(f"the SuperLink does not answer ({type(error).__name__}: {str(error)[:200]}); see "
                               f"{keys.folder / 'superlink.log'}") from None
            time.sleep(0.3)
    return nodes


def control(keys: FlowerFederation) -> Any:
    """A client of the SuperLink's Control API, which answers on its own machine alone."""
    own = inside()
    return own.ControlHttpClient.from_server_address(
        f"localhost:{keys.spec['port']}", False, read(keys.folder / "server" / "ca.crt"),
        interceptors=[own.RuntimeVersionHttpInterceptor(component_name="flwr-cli")])


@contextlib.contextmanager
def flower_run(keys: FlowerFederation) -> Iterator[Any]:
    """Enter a run at the SuperLink and take its ServerApp task; gives the run's Grid."""
    own = inside()
    hasten_pulls()
    logging.getLogger("flwr").setLevel(logging.WARNING)  # what goes well is in the run's record
    data, name = fab()
    address, ca = f"localhost:{keys.spec['port']}", read(keys.folder / "server" / "ca.crt")
    run = control(keys).StartRun(own.StartRunRequest(fab=own.fab_to_proto(own.Fab(name, data, {})))).run_id
    counter = runtime(address, ca, secret=read(keys.folder / "server" / "secret"))
    ends, token = time.monotonic() + START, ""
    while not token:
        got = counter.AcquireTask(own.AcquireTaskRequest(supported_task_types=[own.TaskType.SERVER_APP]))
        token = got.token if got.HasField("task") else ""
        if not token and time.monotonic() > ends:
            raise RunFailed(f"the SuperLink gave no task for run {run} in {START:g} s")
        time.sleep(0 if token else 0.05)
    grid = own.HttpGrid(address, False, ca, token=token)
    gentle(grid._retry_invoker)
    beats = keep_alive(grid._runtime_client)
    status, why = own.SubStatus.FAILED, "the coordinator was interrupted"
    try:
        told = grid._runtime_client.PullTaskInput(own.PullTaskInputRequest())
        if told.run.run_id != run:
            raise RunFailed(f"the SuperLink gave the task of run {told.run.run_id}, which is not ours ({run})")
        identity = own.TaskIdentity
        identity.task_id, identity.run_id, identity.node_id = told.task_id, run, told.context.node_id
        grid.set_run(own.run_from_proto(told.run))
        yield grid
        status, why = own.SubStatus.COMPLETED, ""
    except Exception as error:
        why = type(error).__name__
        raise
    finally:
        beats.stop()
        grid._retry_invoker.max_tries = 1
        with contextlib.suppress(Exception):  # a SuperLink that is gone needs no report
            grid._runtime_client.PushTaskOutput(own.PushTaskOutputRequest(sub_status=status, details=why))
        grid.close()


def await_nodes(grid: Any, nodes: Mapping[str, int], needed: int, wait: float) -> list[str]:
    """The sites that are there, once there are `needed`; RunError when that takes longer than `wait` seconds."""
    ends, before = time.monotonic() + wait, -1
    while True:
        ids = set(grid.get_node_ids())
        here = sorted(site for site, node in nodes.items() if node in ids)
        if len(here) != before:
            progress.info("%d of %d sites are here (%s)", before := len(here), needed, ", ".join(here) or "none")
        if len(here) >= needed:
            return here
        if time.monotonic() > ends:
            raise RunFailed(f"{len(here)} of {needed} sites joined in {wait:g} s ({', '.join(here) or 'none'})")
        time.sleep(0.2)

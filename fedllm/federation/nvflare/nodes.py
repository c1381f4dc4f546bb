"""NVFlare's side of the engine: what runs in the job processes of the server and of the sites.

Only installed code is named in a job; these classes are all that a site's allow-list admits, and no job ships any code.
NVFlare's own controller gives up a run when one site is slow to start, and forgets a site whose process died. Ours
builds its proxies from what both sides have installed, and the server's `Reviver` starts a lost process again.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.collab import CollabCallError, collab
from nvflare.collab.api.app import ClientApp
from nvflare.collab.runtime.controller import CollabController
from nvflare.collab.runtime.dispatch import prepare_for_remote_call
from nvflare.collab.runtime.executor import CollabExecutor
from nvflare.collab.runtime.lifecycle import run_server
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import new_cell_message

from fedllm.core.errors import FedLLMError
from fedllm.engines.far.line import Body, Head, Patience, Silence
from fedllm.engines.far.pieces import InPieces
from fedllm.engines.far.reasons import coded
from fedllm.engines.far.site import SiteHost
from fedllm.federation.answering import Desk, answer_questions
from fedllm.federation.coordinator import FAILED, NotAllHere, drive_run
from fedllm.federation.network import close
from fedllm.federation.nvflare.line import bench
from fedllm.federation.nvflare.reviver import CHANNEL, TOPIC
from fedllm.federation.settings import SETTINGS, SiteSettings
from fedllm.federation.site import open_run
from fedllm.federation.watching import Teller
from fedllm.runs.watch import end_with_main

log = logging.getLogger(__name__)
LONG = 4 << 20
"""Bytes from which a body travels as a tensor."""


class EndOfCall(Signal):
    """Ends one call: with the run, or when nobody waits for its answer any longer."""

    def __init__(self, run: Signal, over: threading.Event) -> None:
        super().__init__()
        self.run, self.over = run, over

    @property
    def triggered(self) -> bool:
        return self.over.is_set() or self.run.triggered


def packed(body: Body) -> Any:
    """A long body as one flat tensor: NVFlare streams tensors several times as fast as bytes."""
    if len(body) < LONG:
        return bytes(body)
    return torch.frombuffer(bytearray(body) if memoryview(body).readonly else body, dtype=torch.uint8)


def unpacked(body: Any) -> Any:
    """The body's bytes (or a view of them), whichever way it came."""
    if isinstance(body, torch.Tensor) and body.dtype == torch.uint8 and body.dim() == 1:
        return body.numpy().data
    if isinstance(body, bytes | bytearray | memoryview):
        return body
    raise TypeError(f"a body of type {type(body).__name__}")


def ended_by(proxy: Any, signal: Signal) -> Any:
    """The same proxy, for one call that `signal` ends; NVFlare finds the function at the proxy or at a child of it."""
    twin = copy.copy(proxy)
    twin.backend = copy.copy(proxy.backend)
    twin.backend.abort_signal = signal
    twin.children = {name: ended_by(child, signal) for name, child in proxy.children.items()}
    return twin


class CollabLink:
    """Carries messages over NVFlare's Collab calls; NVFlare encrypts, streams and authenticates them."""

    def __init__(self, proxies: Sequence[Any], revive: Callable[[str], None]) -> None:
        self.proxies = {p.name: p for p in proxies}
        self._revive = revive

    def revive(self, site: str) -> None:
        self._revive(site)

    def call(self, site: str, head: Head, body: Body, seconds: float,
             over: threading.Event | None = None) -> tuple[Head, Body]:
        proxy = self.proxies[site]
        if over is not None:  # NVFlare would hold the end of the run until an abandoned call has timed out
            proxy = ended_by(proxy, EndOfCall(proxy.backend.abort_signal, over))
        try:
            got = proxy(timeout=max(0.1, seconds)).handle(json.dumps(dict(head)), packed(body))
            return json.loads(got["head"]), unpacked(got["body"])
        except CollabCallError as error:
            raise Silence(str(error.cause or error)[:300]) from None
        except (TypeError, KeyError, ValueError) as error:
            raise Silence(f"an answer that is none: {error}") from None


class CoordinatorNode:
    """The server's object: drives the run in `folder` and leaves its result there."""

    def __init__(self, folder: str, needed: int, patience: dict[str, float] | None = None,
                 bench: list[int] | None = None, desk: dict[str, Any] | None = None) -> None:
        """`bench` measures messages of these sizes in place of a run; at `desk` questions are answered after it."""
        self.folder, self.needed, self.patience, self.bench = folder, needed, patience or {}, bench
        self.desk = None if desk is None else Desk(**desk)
        end_with_main()

    @collab.main
    def run(self) -> None:
        """The whole run; why it failed is written beside its events."""
        torch.set_num_threads(1)
        gc.freeze()  # what NVFlare and torch have built so far stays
        folder, cell, job = Path(self.folder), collab.fl_ctx.get_engine().get_cell(), collab.fl_ctx.get_job_id()

        def revive(site: str) -> None:
            cell.fire_and_forget(channel=CHANNEL, topic=TOPIC, targets=FQCN.ROOT_SERVER,
                                 message=new_cell_message({}, {"job": job, "site": site}), optional=True)

        clients = list(collab.clients)
        link = InPieces(CollabLink(clients, revive))
        try:
            if self.bench:
                bench(link, [p.name for p in clients], self.bench, folder)
                return
            drive_run(folder, link, [p.name for p in clients], self.needed, Patience(**self.patience),
                      after=self.desk and functools.partial(answer_questions, desk=self.desk, name=folder.name))
        except NotAllHere as error:
            log.warning("%s; the coordinator tries again", error)
        except FedLLMError as error:
            (folder / FAILED).write_text(str(error))
            raise


def coordinators(startup: Path) -> list[str]:
    """The hosts that a site's kit was made for."""
    servers = json.loads((startup / "fed_client.json").read_text())["servers"]
    return [str(s["service"]["target"]).rpartition(":")[0] for s in servers]


class SiteNode:
    """A site's object: one process a run, which keeps the base model loaded."""

    def __init__(self) -> None:
        self.host: SiteHost | None = None

    @collab.publish
    def handle(self, head: str, body: Any) -> dict[str, Any]:
        """Any message of the coordinator: envelope (JSON) and payload in, the same out."""
        try:
            self.host = self.host or self._begin()
            said, data = self.host.answer(json.loads(head), unpacked(body))
        except Exception as error:  # NVFlare would send its words to the server
            log.exception("a message could not be answered")
            said, data = {"refused": coded(error)}, b""
        return {"head": json.dumps(said), "body": packed(data)}

    def _begin(self) -> SiteHost:
        """This site's host, under its settings as they are now."""
        site, workspace = collab.site_name, collab.fl_ctx.get_engine().get_workspace()
        settings = SiteSettings.read(Path(workspace.get_site_config_dir()) / SETTINGS)
        close(settings, coordinators(Path(workspace.get_startup_kit_dir())))
        torch.set_num_threads(settings.threads)
        return SiteHost(lambda opening: open_run(opening, site, settings), Teller(Path(workspace.get_root_dir())))


class Conductor(CollabController):
    """NVFlare's Collab controller without its start-up vote: a site that is late or lost is for the engine to judge."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        if self.server_app is None:
            self.system_panic("the coordinator's own code did not start", fl_ctx)
            return
        engine, job = fl_ctx.get_engine(), fl_ctx.get_job_id()
        self.cell = engine.get_cell()
        published = ClientApp(SiteNode()).get_collab_interface()
        proxies = [self._prepare_client_proxy(job, c, published, abort_signal, fl_ctx) for c in engine.get_clients()]
        own = self._prepare_server_proxy(job, abort_signal, self.server_app.get_collab_interface(), fl_ctx)
        self.server_app.setup(fl_ctx.get_workspace(), own, proxies, abort_signal)
        run_server(self.server_app, self.logger)


class Resident(CollabExecutor):
    """NVFlare's Collab executor that answers calls from its start on, so that a process started again is reachable."""

    def _handle_start_run(self, event_type: str, fl_ctx: FLContext) -> None:
        super()._handle_start_run(event_type, fl_ctx)
        end_with_main()
        if self.client_app is None:
            return
        server = FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])
        prepare_for_remote_call(cell=fl_ctx.get_engine().get_cell(), app=self.client_app, logger=self.logger,
                                executor=self.inbound_executor, participants={server: "server"})

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        return make_reply("TASK_UNKNOWN")

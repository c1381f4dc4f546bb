"""In NVFlare's main server process: what a lost site needs to come back into a running job. Imports no model code."""

from __future__ import annotations

from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_scheduler_spec import DispatchInfo
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import new_cell_message

CHANNEL, TOPIC = "fedllm", "revive"


class Reviver(FLComponent):
    """Lives in the server's main process: starts a site's job process again when the coordinator misses it."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            self.engine = fl_ctx.get_engine()
            self.engine.server.cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=self._revive)
        elif event_type == EventType.JOB_STARTED:
            self._outlive(str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)["job_id"]))

    def _outlive(self, job_id: str) -> None:
        """NVFlare fails a whole job when a site reports that its process died, unless that report is not waited for."""
        runner = self.engine.job_runner
        for client in self.engine.get_clients():
            if runner.is_client_outcome_pending(job_id, client.name):
                runner.resolve_client_outcome(job_id, client.name)

    def _revive(self, request: Any) -> Any:
        job_id, site = str(request.payload["job"]), str(request.payload["site"])
        origin = request.get_header(MessageHeaderKey.ORIGIN)
        job = self.engine.job_runner.running_jobs.get(job_id)
        if job is None or origin != FQCN.join([FQCN.ROOT_SERVER, job_id]):
            return new_cell_message({MessageHeaderKey.RETURN_CODE: ReturnCode.INVALID_REQUEST})
        with self.engine.new_context() as fl_ctx:
            replies = self.engine.start_client_job(job, {site: DispatchInfo("app", {}, None)}, fl_ctx)
        self.logger.info(f"start of job {job_id} at '{site}' again: {[r.reply and r.reply.body for r in replies]}")
        return new_cell_message({MessageHeaderKey.RETURN_CODE: ReturnCode.OK})

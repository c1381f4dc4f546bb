"""`python -m fedllm.federation.flower.desk KIT ADDRESS`: a site's resident process behind its SuperNode.

It takes the SuperNode's tasks and answers them with installed code, so that the base model is loaded once for a run.
What a run's app bundle holds is neither unpacked nor executed; a bundle other than ours is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedLLMError, PayloadError
from fedllm.engines.far.site import BOOT, Said, SiteHost, SiteRun
from fedllm.federation.flower.internals import fab, hasten_pulls, inside, keep_alive, runtime
from fedllm.federation.flower.keys import KIT
from fedllm.federation.flower.wire import Head, from_record, read, to_record

log = logging.getLogger(__name__)
HOLD = 2.0
"""Seconds for which a message is held until its work is done; then the answer is `pending`, which is a sign of life."""
POLL = 0.02
LONG = 64 << 20
"""Bytes from which a task's transfer may outlast Flower's patience without heartbeats."""
KEPT = 4
"""Pieces of work whose answers wait to be fetched; the oldest is one that nobody waits for."""


OpenRun = Callable[[Head], tuple[SiteRun, dict[str, Any]]]


class Desk:
    """A site's host, for a line that must not be held: work goes on while `pending` is said."""

    def __init__(self, open_run: OpenRun, hold: float = HOLD, tell: Callable[..., None] = lambda what, **_: None
                 ) -> None:
        self.open_run, self.hold, self.tell = open_run, hold, tell
        self.host, self.run = SiteHost(open_run, tell), ""
        self.work: dict[str, Future[Said]] = {}

    def answer(self, head: Head, body: Any) -> Said:
        """The host's answer if it comes soon, or `pending`; `fetch` asks for it again."""
        op, ticket = head.get("op"), str(head.get("ticket"))
        if op == "probe":
            return self.host.answer(head, body)
        if op != "fetch":
            self._begin(ticket, head, body)
        if ticket not in self.work:
            return {"unknown": True, "boot": BOOT}, b""
        try:
            answer = self.work[ticket].result(self.hold)
        except NotYet:
            return {"pending": True, "boot": BOOT}, b""
        del self.work[ticket]
        return answer

    def _begin(self, ticket: str, head: Head, body: Any) -> None:
        done: Future[Said] = Future()
        self.work[ticket] = done
        if head.get("op") == "open" and self.run not in ("", str(head.get("run"))):
            self.host = SiteHost(self.open_run, self.tell)  # a run of its own, which finds nothing of the one before
        if head.get("op") == "open":
            self.run = str(head.get("run"))
        host = self.host
        while len(self.work) > KEPT:
            del self.work[next(iter(self.work))]

        def run() -> None:
            try:
                done.set_result(host.answer(head, body))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="desk-work", daemon=True).start()


def attend(desk: Desk, address: str, secret: bytes) -> None:
    """Take tasks until this process is ended; the SuperNode's end is for `join` to notice."""
    own = inside()
    hasten_pulls()
    counter, mine = runtime(address, None, secret=secret), fab()[1]
    request = own.AcquireTaskRequest(supported_task_types=[own.TaskType.CLIENT_APP])
    while True:
        got = counter.AcquireTask(request)
        if not (got.HasField("task") and got.token):
            time.sleep(POLL)
            continue
        client = runtime(address, None, token=got.token)
        try:
            _one(desk, client, mine)
        except Exception as error:  # a task that broke off: its sender has a deadline
            log.warning("a task broke off: %s: %s", type(error).__name__, error)
        finally:
            client.close()


def _one(desk: Desk, client: Any, mine: str) -> None:
    """One task: a message in, its answer out."""
    from flwr.app import Message
    from flwr.app.error import Error

    own = inside()
    message, context, _, bundle = own.pull_task_input(client)
    beats = None
    try:
        if bundle.hash_str != mine:
            raise PayloadError(f"this site runs fedllm alone, and the run is of another app ({bundle.hash_str[:12]})")
        head, body = from_record(message.content)
        said, data = desk.answer(head, body)
        if len(data) > LONG:
            beats = keep_alive(client)
        reply = Message(to_record(said, data), reply_to=message)
        status, why = own.SubStatus.COMPLETED, ""
    except PayloadError as error:
        log.warning("refused: %s", error)
        reply = Message(Error(code=own.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=str(error)), reply_to=message)
        status, why = own.SubStatus.FAILED, str(error)
    try:
        own.push_message(client, reply, context)
    finally:
        if beats is not None:
            beats.stop()
        own.push_task_output(client=client, context=context, sub_status=status, details=why)


def main() -> None:
    """Serve the kit's site behind the SuperNode at the address."""
    import torch

    from fedllm.federation.network import close
    from fedllm.federation.settings import SETTINGS, SiteSettings
    from fedllm.federation.site import open_run
    from fedllm.federation.watching import Teller

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for chatty in ("httpx", "flwr"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    kit, address = Path(sys.argv[1]), sys.argv[2]
    site = json.loads(read(kit / KIT))["site"]
    settings = SiteSettings.read(kit / "local" / SETTINGS)
    close(settings)  # it talks to the SuperNode on this machine alone
    torch.set_num_threads(settings.threads)
    with contextlib.suppress(KeyboardInterrupt):
        attend(Desk(lambda head: open_run(head, site, SiteSettings.read(kit / "local" / SETTINGS)), tell=Teller(kit)),
               address, read(kit / "secret"))


if __name__ == "__main__":
    try:
        main()
    except FedLLMError as error:
        sys.exit(f"{type(error).__name__}: {error}")

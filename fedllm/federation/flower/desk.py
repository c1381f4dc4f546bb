"""`python -m fedllm.federation.flower.desk KIT ADDRESS`: a site's resident process behind its SuperNode.

It takes the SuperNode's tasks and answers them with installed code, so that the base model is loaded once for a run.
What a run's app bundle holds is neither unpacked nor executed; a bundle other than ours is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedLLMError, PayloadError
from fedllm.engines.far.desk import Desk
from fedllm.federation.flower.internals import fab, hasten_pulls, inside, keep_alive, runtime
from fedllm.federation.flower.keys import KIT
from fedllm.federation.flower.wire import from_record, read, to_record

log = logging.getLogger(__name__)
POLL = 0.02
LONG = 64 << 20
"""Bytes from which a task's transfer may outlast Flower's patience without heartbeats."""
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

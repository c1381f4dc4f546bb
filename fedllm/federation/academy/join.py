"""An organisation's side of an Academy federation: one resident process with its agent, kept alive."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm.federation.academy.keys import KIT, read
from fedllm.federation.academy.wire import check_academy
from fedllm.federation.process import end_tree, no_proxy, stoppable
from fedllm.federation.settings import SiteSettings
from fedllm.federation.watching import SiteWatch
from fedllm.runs.watch import begun

log = logging.getLogger(__name__)
PAUSE = 2.0
CONNECTED = "the exchange has let this site's agent in"
"""What the site's process logs then."""


def is_academy_kit(kit: str | Path) -> bool:
    """Whether a kit was made with `fedllm keys new --engine academy`."""
    return (Path(kit) / KIT).exists()


def join_academy(address: str, data: str | Path, *, kit: str | Path, methods: Sequence[str] | None = None,
                 models: Sequence[str] = (), store: str | Path | None = None, policy: str | Path | None = None,
                 stop: Callable[[], bool] = lambda: False, **settings: Any) -> None:
    """Take part in a federation until stopped, as `federation.nvflare.join` does on NVFlare."""
    check_academy()
    kit = Path(kit).resolve()
    SiteSettings.settle(kit, address, json.loads(read(kit / KIT))["address"], data, methods=methods, models=models,
                        store=store, policy=policy, **settings)
    watch = SiteWatch(kit, address, "process.log", CONNECTED)
    with contextlib.suppress(KeyboardInterrupt), stoppable(), no_proxy():
        while not stop():
            watch.begin()
            with (kit / "process.log").open("ab") as out:
                process = begun(["fedllm.federation.academy.site", str(kit)], out)
            try:
                while process.poll() is None and not stop():
                    time.sleep(0.1)
                    watch.look()
            finally:
                end_tree(process.pid)
                process.wait(30)
            if not stop():
                log.warning("the site's process ended with %s; it is started again", process.returncode)
                time.sleep(PAUSE)

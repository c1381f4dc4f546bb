"""An organisation's side: one line that takes part in a federation until it is stopped. Loads no model itself."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.federation.nvflare.process import kit_process
from fedllm.federation.process import no_proxy, stoppable
from fedllm.federation.settings import SiteSettings
from fedllm.federation.watching import SiteWatch

log = logging.getLogger(__name__)
CONNECTED = "Successfully registered client"
"""What NVFlare's client logs once the server knows it."""


def join(address: str, data: str | Path, *, kit: str | Path, methods: Sequence[str] | None = None,
         models: Sequence[str] = (), store: str | Path | None = None, policy: str | Path | None = None,
         stop: Callable[[], bool] = lambda: False, **settings: Any) -> None:
    """Take part in a federation until stopped: this site's process, its data and its settings.

    `address` must be the one that the kit was made for. `settings` are `SiteSettings`, kept in the kit's local folder;
    what the YAML file `policy` says comes before them.
    """
    kit = Path(kit).resolve()
    target = _target(kit)
    SiteSettings.settle(kit, address, target, data, methods=methods, models=models, store=store, policy=policy,
                        **settings)
    name = json.loads((kit / "startup" / "fed_client.json").read_text())["client"]["fqsn"]
    watch = SiteWatch(kit, address, "process.log", CONNECTED)
    with contextlib.suppress(KeyboardInterrupt), stoppable(), no_proxy():
        while not stop():
            words, alone = (f"uid={name}", f"org={name.replace('-', '_')}"), False
            watch.begin()
            with kit_process(kit, "client", "fed_client.json", *words) as process:
                while process.poll() is None and not stop() and not alone:
                    time.sleep(0.2)
                    watch.look()
                    alone = watch.alone
            if alone and not stop():
                watch.wait(stop)
                continue
            if process.returncode == 0 or stop():
                return
            log.warning("the site's process ended with %s; it is started again", process.returncode)
            time.sleep(2.0)


def _target(kit: Path) -> str:
    try:
        return json.loads((kit / "startup" / "fed_client.json").read_text())["servers"][0]["service"]["target"]
    except OSError:
        raise RecipeError(f"{kit} is no site's kit (it has no startup/fed_client.json); ask the coordinator for the "
                          "one that `fedllm keys` made") from None

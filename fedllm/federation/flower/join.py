"""An organisation's side of a Flower federation: a SuperNode and a resident process behind it, kept alive together."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fedllm.federation.flower.internals import check_flower
from fedllm.federation.flower.keys import KIT
from fedllm.federation.flower.wire import QUIET, read
from fedllm.federation.process import end_tree, free_port, no_proxy, stoppable
from fedllm.federation.settings import SiteSettings
from fedllm.federation.watching import SiteWatch
from fedllm.runs.watch import begun

log = logging.getLogger(__name__)
PAUSE = 2.0
CONNECTED = "SuperNode ID"
"""What Flower's SuperNode logs once the SuperLink knows it."""


def is_flower_kit(kit: str | Path) -> bool:
    """Whether a kit was made with `fedllm keys new --engine flower`."""
    return (Path(kit) / KIT).exists()


def join_flower(address: str, data: str | Path, *, kit: str | Path, methods: Sequence[str] | None = None,
                models: Sequence[str] = (), store: str | Path | None = None, policy: str | Path | None = None,
                stop: Callable[[], bool] = lambda: False, **settings: Any) -> None:
    """Take part in a federation until stopped, as `federation.nvflare.join` does on NVFlare."""
    check_flower()
    kit = Path(kit).resolve()
    target = json.loads(read(kit / KIT))["address"]
    SiteSettings.settle(kit, address, target, data, methods=methods, models=models, store=store, policy=policy,
                        **settings)
    watch = SiteWatch(kit, address, "supernode.log", CONNECTED)
    with contextlib.suppress(KeyboardInterrupt), stoppable(), no_proxy():
        while not stop():
            alone = False
            watch.begin()
            with site_processes(kit, target) as pair:
                while all(p.poll() is None for p in pair) and not stop() and not alone:
                    time.sleep(0.1)
                    watch.look()
                    alone = watch.alone
            if alone and not stop():
                watch.wait(stop)
            elif not stop():
                log.warning("the site's processes ended (%s); they are started again",
                            ", ".join(str(p.returncode) for p in pair))
                time.sleep(PAUSE)


def watched(words: Sequence[str], log: IO[bytes], cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """A process of Flower's that ends with this one, however this one ends."""
    return begun(words, log, cwd, **QUIET)


@contextlib.contextmanager
def site_processes(kit: Path, superlink: str) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A SuperNode and its resident process; when one is gone, so is the other: a new one may not find old tasks."""
    secret = kit / "secret"
    secret.touch(0o600)
    secret.write_bytes(secrets.token_bytes(32))  # no other user of this machine may take the SuperNode's tasks
    port = free_port()
    node = ["fedllm.federation.flower.supernode", "--superlink", superlink, "--root-certificates", str(kit / "ca.crt"),
            "--auth-supernode-private-key", str(kit / "node.key"), "--isolation", "process", "--host", "127.0.0.1",
            "--port", str(port), "--superexec-auth-secret-file", str(secret)]
    desk = ["fedllm.federation.flower.desk", str(kit), f"127.0.0.1:{port}"]
    pair: list[subprocess.Popen[bytes]] = []
    try:
        for words, name in ((node, "supernode.log"), (desk, "process.log")):
            with (kit / name).open("ab") as out:
                pair.append(watched(words, out))
        yield pair[0], pair[1]
    finally:
        for process in pair:
            end_tree(process.pid)
            process.wait(30)

"""What crosses Flower: an envelope and a body in one message, and the few internals of flwr 1.41/1.42 that we touch.

`flwr` runs an app's code anew for each message and sleeps whole seconds between them. Here a run's app is only a name
(nobody unpacks or executes it), and both sides hold on to what they have loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx

from fedllm.core.errors import FedLLMError, PayloadError

log = logging.getLogger(__name__)
Head = Mapping[str, Any]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of every Flower process: it tells nobody that it runs."""
KIND, HEAD, BODY, BUFFER = "query", "head", "body", "buffer"
RANGE = ("1.41", "1.43")
PYPROJECT = """
[project]
name = "fedllm"
version = "0.1.0"
description = "The name of a fedllm run; it holds no code."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41,<1.43"]
[tool.flwr.app]
publisher = "fedllm"
fab-format-version = 1
flwr-version-target = "{version}"
[tool.flwr.app.components]
serverapp = "fedllm_name.app:server_app"
clientapp = "fedllm_name.app:client_app"
"""


def check_flower() -> None:
    """Refuse a flwr that is missing or was not tested."""
    try:
        have = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise FedLLMError("engine.kind = 'flower' needs Flower; pip install 'fedlm[flower]'") from None
    least, below = ([int(x) for x in v.split(".")] for v in RANGE)
    if not least <= [int(x) for x in have.split(".")[:2]] < below:
        raise FedLLMError(f"flwr {have} is installed; allowed is >={RANGE[0]},<{RANGE[1]}, which this engine knows")


def to_record(head: Head, body: bytes | bytearray | memoryview) -> Any:
    """A message's content: only an `Array` is cut into chunks, so a body is one. Do not change it until it is sent."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    record = RecordDict({HEAD: ConfigRecord({"json": json.dumps(dict(head))})})
    if len(body):
        array = Array(dtype="uint8", shape=(len(body),), stype="fedllm.bytes", data=b"")
        array.data = memoryview(body)  # type: ignore[assignment] (the constructor insists on bytes, which is a copy)
        record[BODY] = ArrayRecord()
        record[BODY][BUFFER] = array
    return record


def from_record(record: Any) -> tuple[dict[str, Any], Any]:
    """Envelope and body; PayloadError when the content is none of ours."""
    try:
        head = json.loads(str(record[HEAD]["json"]))
        body = record[BODY][BUFFER].data if BODY in record else b""
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"a message that is none of ours: {type(error).__name__}: {error}") from None
    if not isinstance(head, dict):
        raise PayloadError("a message whose envelope is no mapping")
    return head, body


def fab() -> tuple[bytes, str]:
    """The app bundle under which a run goes, made in memory, and its hash. The same for every run of this version."""
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.version import package_version

    empty = b"def server_app(*_): raise RuntimeError('a name, not an app')\n\n\nclient_app = server_app\n"
    data, _ = build_fab_from_files({
        "pyproject.toml": PYPROJECT.format(version=package_version).encode(), "LICENSE": b"Apache-2.0\n",
        "fedllm_name/__init__.py": b"", "fedllm_name/app.py": empty})
    return data, hashlib.sha256(data).hexdigest()


def runtime(address: str, ca: bytes | None, *, token: str = "", secret: bytes = b"", part: str = "flwr-clientapp"
            ) -> Any:
    """A client of a SuperLink's or SuperNode's Runtime API: with a task's token, or with the secret to get tasks."""
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient

    version = RuntimeVersionHttpInterceptor(component_name=part if token else "SuperExec")
    proof = RuntimeTokenHttpInterceptor(token) if token else SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
    return RuntimeHttpClient.from_server_address(address, ca is None, ca, interceptors=[version, proof],
                                                 retry_invoker=gentle(make_simple_http_retry_invoker()))


def gentle(invoker: Any) -> Any:
    """Let a call with a token that no longer counts fail: flwr interrupts its whole process for it (SIGINT).

    A token stops counting when its task ends, and a call may be under way just then.
    """
    stock = invoker.should_giveup

    def should_giveup(error: Exception) -> bool:
        refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED
        return refused or stock(error)

    invoker.should_giveup = should_giveup
    return invoker


def keep_alive(client: Any) -> Any:
    """Heartbeats for a task that takes long; unlike Flower's own they never end this process."""
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
    from flwr.supercore.heartbeat import HeartbeatSender

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except Exception as error:  # the server may be gone for a while
            log.debug("no heartbeat: %s", error)
            return False
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    return sender


class Brisk:
    """The `time` module with short sleeps, for the loops of flwr that have fixed ones."""

    def __init__(self, longest: float) -> None:
        self.longest = longest

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """No longer than `longest`."""
        time.sleep(min(seconds, self.longest))


def hasten(module: ModuleType, longest: float) -> bool:
    """Shorten a module's fixed sleeps; False (and stock behavior) where flwr has changed."""
    if getattr(module, "time", None) is not time:
        log.warning("%s has no sleeps that could be shortened; rounds take seconds longer", module.__name__)
        return False
    module.time = Brisk(longest)  # type: ignore[attr-defined]
    return True


def hasten_pulls() -> bool:
    """A pull that races the push of its object waits 1, 2, 4 s; here it begins at 20 ms."""
    from flwr.supercore.inflatable import inflatable_utils

    pulls = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)  # each has its own
    knobs = [pull.__kwdefaults__ or {} for pull in pulls]
    if not all({"initial_backoff", "backoff_cap", "max_tries_per_object"} <= known.keys() for known in knobs):
        log.warning("flwr's pulls of objects cannot be hastened; messages take seconds longer")
        return False
    for known in knobs:
        known.update(initial_backoff=0.02, backoff_cap=1.0, max_tries_per_object=10**6)  # its own `max_time` bounds it
    return True


def read(path: Path) -> bytes:
    """A file of a kit."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedLLMError(f"{path} cannot be read: {error.strerror}") from None

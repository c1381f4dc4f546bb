"""The internals of flwr that this engine touches, all in this file; tried with flwr 1.41 and 1.42.

`flwr` runs an app's code anew for each message and sleeps whole seconds between them. Here a run's app is only a name
(nobody unpacks or executes it), and both sides hold on to what they have loaded. A release that lacks one of `INSIDE`
is refused by that name (1.43 takes gRPC out of Fleet and Control, and may move more).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import logging
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx

from fedllm.core.errors import FedLLMError

log = logging.getLogger(__name__)
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
INSIDE = {
    "flwr.cli.build": ("build_fab_from_files",),
    "flwr.common.constant": ("ErrorCode", "SubStatus"),
    "flwr.common.serde": ("fab_to_proto", "run_from_proto"),
    "flwr.proto.control_pb2": ("RegisterNodeRequest", "StartRunRequest"),
    "flwr.proto.runtime_pb2": ("AcquireTaskRequest", "PullTaskInputRequest", "PushTaskOutputRequest",
                               "SendTaskHeartbeatRequest"),
    "flwr.supercore.constant": ("TaskType",),
    "flwr.supercore.control": ("ControlHttpClient",),
    "flwr.supercore.fab": ("Fab",),
    "flwr.supercore.heartbeat": ("HeartbeatSender",),
    "flwr.supercore.inflatable.inflatable_utils": ("pull_objects", "pull_and_inflate_object_from_tree"),
    "flwr.supercore.interceptors": ("RuntimeTokenHttpInterceptor", "RuntimeVersionHttpInterceptor",
                                    "SuperExecAuthHttpInterceptor"),
    "flwr.supercore.primitives.asymmetric": ("public_key_to_bytes",),
    "flwr.supercore.retry": ("make_simple_http_retry_invoker",),
    "flwr.supercore.runtime": ("RuntimeHttpClient",),
    "flwr.supercore.task_identity": ("TaskIdentity",),
    "flwr.supercore.version": ("package_version",),
    "flwr.superlink.grid.http_grid": ("HttpGrid",),
    "flwr.supernode.runtime.run_clientapp": ("pull_task_input", "push_message", "push_task_output"),
}
"""Module -> what we use of it, when a process first needs any of it."""


@functools.cache
def inside() -> SimpleNamespace:
    """Everything in `INSIDE` by its own name; FedLLMError with what this release lacks."""
    return SimpleNamespace(**{name: part(module, name) for module, names in INSIDE.items() for name in names})


def part(module: str, name: str) -> Any:
    """One name of flwr's; FedLLMError where this release does not have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FedLLMError(f"flwr {importlib.metadata.version('flwr')} has changed inside ({error}); this engine was "
                          f"tried with >={RANGE[0]},<{RANGE[1]}: pip install 'fedlm[flower]'") from None


def run_supernode(poll: float) -> None:
    """Flower's SuperNode with the command line's options, looking for messages every `poll` seconds."""
    node = part("flwr.supernode.cli", "flower_supernode")
    hasten(importlib.import_module("flwr.supernode.start_client_internal"), poll)
    hasten_pulls()
    sys.argv[0] = "flower-supernode"
    node()


def run_superlink(guard: Any) -> None:
    """Flower's SuperLink with the command line's options behind an ASGI middleware; without it, it does not start."""
    from starlette.middleware import Middleware

    link, before = part("flwr.superlink.cli", "flower_superlink"), part("flwr.superlink.main", "_get_middleware")
    importlib.import_module("flwr.superlink.main")._get_middleware = lambda: [Middleware(guard), *before()]
    sys.argv[0] = "flower-superlink"
    link()


def check_flower() -> None:
    """Refuse a flwr that is missing, was not tested, or has changed inside."""
    try:
        have = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise FedLLMError("engine.kind = 'flower' needs Flower; pip install 'fedlm[flower]'") from None
    least, below = ([int(x) for x in v.split(".")] for v in RANGE)
    if not least <= [int(x) for x in have.split(".")[:2]] < below:
        raise FedLLMError(f"flwr {have} is installed; allowed is >={RANGE[0]},<{RANGE[1]}, which this engine knows")
    inside()


def fab() -> tuple[bytes, str]:
    """The app bundle under which a run goes, made in memory, and its hash. The same for every run of this version."""

    empty = b"def server_app(*_): raise RuntimeError('a name, not an app')\n\n\nclient_app = server_app\n"
    own = inside()
    data, _ = own.build_fab_from_files({
        "pyproject.toml": PYPROJECT.format(version=own.package_version).encode(), "LICENSE": b"Apache-2.0\n",
        "fedllm_name/__init__.py": b"", "fedllm_name/app.py": empty})
    return data, hashlib.sha256(data).hexdigest()


def runtime(address: str, ca: bytes | None, *, token: str = "", secret: bytes = b"", part: str = "flwr-clientapp"
            ) -> Any:
    """A client of a SuperLink's or SuperNode's Runtime API: with a task's token, or with the secret to get tasks."""
    own = inside()
    version = own.RuntimeVersionHttpInterceptor(component_name=part if token else "SuperExec")
    proof = own.RuntimeTokenHttpInterceptor(token) if token else own.SuperExecAuthHttpInterceptor(
        master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
    return own.RuntimeHttpClient.from_server_address(address, ca is None, ca, interceptors=[version, proof],
                                                 retry_invoker=gentle(own.make_simple_http_retry_invoker()))


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
    own = inside()

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(own.SendTaskHeartbeatRequest())
        except Exception as error:  # the server may be gone for a while
            log.debug("no heartbeat: %s", error)
            return False
        return True

    sender = own.HeartbeatSender(beat)
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
    own = inside()
    pulls = (own.pull_objects, own.pull_and_inflate_object_from_tree)  # each has its own
    knobs = [pull.__kwdefaults__ or {} for pull in pulls]
    if not all({"initial_backoff", "backoff_cap", "max_tries_per_object"} <= known.keys() for known in knobs):
        log.warning("flwr's pulls of objects cannot be hastened; messages take seconds longer")
        return False
    for known in knobs:
        known.update(initial_backoff=0.02, backoff_cap=1.0, max_tries_per_object=10**6)  # its own `max_time` bounds it
    return True

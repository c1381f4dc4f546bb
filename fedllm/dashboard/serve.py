"""Serves the dashboard until it is interrupted."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError, RunError
from fedllm.dashboard.shelf import roots

log = logging.getLogger(__name__)


def dashboard(folders: Sequence[str | Path] = (), *, host: str = "127.0.0.1", port: int = 8321,
              say: Callable[[str], None] = log.info) -> None:
    """Show the runs under these folders (runs/ and comparisons/ by default) on a page at host:port, until Ctrl-C.

    On another host than loopback a token is made, and told once with the address (`say`). RecipeError without the
    extra `dashboard`, RunError for a folder that is not there or a port that is taken.
    """
    with server(folders, host=host, port=port) as (web, sock, address):
        say(address)
        with contextlib.suppress(KeyboardInterrupt):
            web.run(sockets=[sock])


@contextlib.contextmanager
def server(folders: Sequence[str | Path], *, host: str, port: int) -> Iterator[tuple[Any, socket.socket, str]]:
    """The server that is not yet running, its socket, and the address to open (with the token, where one is needed)."""
    try:
        import uvicorn

        from fedllm.dashboard.app import make_app
        from fedllm.dashboard.board import Board
        from fedllm.dashboard.gate import is_loopback
    except ImportError as error:
        raise RecipeError(f"`fedllm dashboard` needs the package {error.name}; pip install "
                          "'fedlm[dashboard]'") from None

    class Server(uvicorn.Server):
        """Open streams end when the server is told to."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.pages.closing.set()
            super().handle_exit(sig, frame)

    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    app = make_app(Board(roots([Path(f) for f in folders])), token)
    sock = bound(host, port)
    with sock:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{sock.getsockname()[1]}/" + (f"?token={token}" if token else "")
        yield Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3,
                                    server_header=False, lifespan="off", ws="none")), sock, address


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; RunError where it cannot."""
    if not 0 <= port <= 65535:
        raise RecipeError(f"--port {port}: allowed is 0 (a free one) to 65535")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise RecipeError(f"--host {host}: this is no address of this machine ({error.strerror})") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise RunError(f"port {port} of {host} cannot be opened: {error.strerror}; give another with --port (0: a free "
                       "one)") from None
    return sock

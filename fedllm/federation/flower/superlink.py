"""`python -m fedllm.federation.flower.superlink`: Flower's SuperLink, whose controls answer this machine alone.

Flower 1.42 serves the sites and the controls (start and stop runs, register nodes) at one port, and the controls ask
nobody who they are. So requests to anything but the sites' part are refused unless they come from this machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

from fedllm.federation.flower.internals import run_superlink

OPEN = ("/v1/fleet/",)
"""What sites may reach: it checks their keys."""


class FromHere:
    """ASGI middleware: who is elsewhere reaches only the paths in `OPEN`."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass on, or answer 403."""
        if scope["type"] in ("http", "websocket") and not scope["path"].startswith(OPEN) and not _here(scope):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"from this machine only"})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)


def _here(scope: dict[str, Any]) -> bool:
    host = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


if __name__ == "__main__":
    run_superlink(FromHere)

"""`python -m fedllm.federation.academy.exchange FEDERATION`: Academy's HTTP exchange by TLS, for those with a token.

Academy's own exchange asks its callers nothing (or a Globus login). Here the coordinator may do everything, and a site
hear its own mailbox and answer from it: nothing else, of nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
import uuid
from pathlib import Path
from typing import Any

from aiohttp import web

from fedllm.core.errors import FedLLMError
from fedllm.federation.academy.agent import AGENT
from fedllm.federation.academy.keys import COORDINATOR, AcademyFederation
from fedllm.federation.academy.wire import check_academy

log = logging.getLogger(__name__)
HEARS = (("GET", "/mailbox/listen"), ("POST", "/mailbox/heartbeat"), ("GET", "/mailbox/heartbeat"))
"""What a site may do with its own mailbox."""


def door(keys: AcademyFederation) -> Any:
    """The middleware before Academy's routes."""
    agents = keys.agents()

    @web.middleware
    async def look(request: web.Request, handler: Any) -> web.StreamResponse:
        who = keys.who(request.headers.get("Authorization", ""))
        if who is None:
            return web.Response(status=401, text="no token of this federation")
        if who != COORDINATOR and not await _may(request, agents.get(who)):
            log.warning("site '%s' was refused %s %s", who, request.method, request.path)
            return web.Response(status=405, text="not a site's to do")
        return await handler(request)

    return look


async def _may(request: web.Request, mine: uuid.UUID | None) -> bool:
    """Whether a site asks for its own mailbox, or sends an answer from it."""
    try:
        said = await request.json()
        if (request.method, request.path) == ("PUT", "/message"):
            header = json.loads(said["message"])["header"]
            return header["kind"] == "response" and uuid.UUID(header["src"]["uid"]) == mine
        return (request.method, request.path) in HEARS and uuid.UUID(json.loads(said["mailbox"])["uid"]) == mine
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


async def begin(keys: AcademyFederation) -> web.AppRunner:
    """The exchange with an empty mailbox for each site's agent."""
    from academy.exchange.cloud.app import MANAGER_KEY, create_app
    from academy.exchange.cloud.client_info import ClientInfo
    from academy.identifier import AgentId

    app = create_app()
    app.middlewares.append(door(keys))  # behind Academy's own, which copies the request before anybody reads it
    for site, uid in keys.agents().items():
        agent: Any = AgentId(uid=uid, name=site)
        await app[MANAGER_KEY].create_mailbox(ClientInfo(client_id="", group_memberships=set()), agent, (AGENT,))
    # A listener whose process was killed must take no message with it.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(keys.folder / "server" / "server.crt", keys.folder / "server" / "server.key")
    await web.TCPSite(runner, "0.0.0.0", int(keys.spec["port"]), ssl_context=context).start()
    return runner


async def forever(keys: AcademyFederation) -> None:
    """Until this process is ended."""
    await begin(keys)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        check_academy()
        asyncio.run(forever(AcademyFederation(Path(sys.argv[1]))))
    except FedLLMError as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""The line to far sites over Academy: a `engines.far.sites.Link` made of actions of the sites' agents."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from fedllm.core.errors import PayloadError, RunFailed
from fedllm.engines.far.desk import fetched
from fedllm.engines.far.line import Barred, Body, Head, Silence
from fedllm.federation.academy.keys import AcademyFederation, token
from fedllm.federation.academy.wire import down, seal, trusting, unseal, up

log = logging.getLogger(__name__)
TRIP = 20.0
"""Seconds that one message and its answer may take; a site holds none longer than 2 s (`desk.HOLD`)."""
START = 120.0
"""Seconds in which the exchange must let the coordinator in."""
LAST = 5.0
"""Seconds that the goodbye may take."""


class AcademyLink:
    """A user of the exchange, in a thread of its own; each site is an agent that is asked to `take` a question."""

    def __init__(self, keys: AcademyFederation) -> None:
        """RunError where the exchange does not answer."""
        self.keys, self.sites = keys, keys.agents()
        self.secrets = {site: keys.key(site) for site in self.sites}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="academy", daemon=True).start()
        try:
            self._run(self._connect()).result(START)
        except Exception as error:
            raise RunFailed(f"the exchange does not answer ({type(error).__name__}: {str(error)[:200]}); see "
                           f"{keys.folder / 'exchange.log'}") from None

    def call(self, site: str, head: Head, body: Body, seconds: float, over: threading.Event | None = None
             ) -> tuple[Head, Body]:
        """The site's answer; raises `Silence` when there is none within `seconds`, or once `over` is set."""
        return fetched(lambda told, data, ends: self._trip(site, told, data, ends, over), head, body, seconds)

    def revive(self, site: str) -> None:
        """Nothing to do: `fedllm join` starts a lost process again by itself."""

    def close(self) -> None:
        """No answer is waited for any longer."""
        try:
            self._run(self._goodbye()).result(LAST)
        except Exception as error:  # an exchange that is gone needs no goodbye
            log.debug("no goodbye: %s", error)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _goodbye(self) -> None:
        await self.client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _connect(self) -> None:
        from academy.exchange import HttpExchangeFactory
        from academy.handle import Handle
        from academy.identifier import AgentId

        from fedllm.federation.academy.agent import JSON

        context: Any = trusting(self.keys.folder / "server" / "ca.crt")
        factory = HttpExchangeFactory(f"https://localhost:{self.keys.spec['port']}", ssl_verify=context, retries=0,
                                      additional_headers={"Authorization": f"Bearer {token(self.keys.own())}"})
        self.client = await factory.create_user_client(name="coordinator")
        told: dict[str, Any] = {"request_serializer": JSON, "result_serializer": JSON, "exception_serializer": JSON}
        self.handles = {site: Handle(AgentId(uid=uid, name=site), exchange=self.client, ignore_context=True, **told)
                        for site, uid in self.sites.items()}

    def _trip(self, site: str, head: Head, body: Body, ends: float, over: threading.Event | None
              ) -> tuple[dict[str, Any], Body]:
        """One message there and its answer back."""
        left = min(ends - time.monotonic(), TRIP)
        if left <= 0:
            raise Silence("its deadline passed")
        if why := self.keys.barred(site):
            raise Barred(why)
        number = uuid.uuid4().hex
        asked = self._run(self._ask(site, number, seal(self.secrets[site], down(site, number), head, body)))
        text = self._await(asked, time.monotonic() + left, over)
        try:
            return unseal(self.secrets[site], up(site, number), text)
        except PayloadError as error:
            raise Silence(f"its answer cannot be read: {error}") from None

    async def _ask(self, site: str, number: str, sealed: str) -> Any:
        from academy.serialize import allowed_deserializers

        from fedllm.federation.academy.agent import JSON

        allowed_deserializers.set({JSON})  # of this task: whatever a site answers, nothing is unpickled
        return await self.handles[site].action("take", number, sealed)

    def _await(self, asked: concurrent.futures.Future[Any], ends: float, over: threading.Event | None) -> Any:
        while True:
            left = ends - time.monotonic()
            try:
                return asked.result(max(0.0, min(left, 0.5)))
            except TimeoutError:
                own = asked.done() and not asked.cancelled() and asked.exception() is not None  # a timeout of Academy's
                if left <= 0 or own or (over is not None and over.is_set()):
                    asked.cancel()
                    raise Silence("no answer came in time") from None
            except Exception as error:  # the exchange is gone, refuses, or the site's agent does
                raise Silence(f"Academy says: {type(error).__name__}: {str(error)[:200]}") from None

    def _run(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

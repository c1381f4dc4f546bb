"""A site as an Academy agent: one action, which takes a sealed question and gives a sealed answer."""

from __future__ import annotations

import logging
from typing import Any

from academy.agent import Agent, action
from academy.runtime import RuntimeConfig
from academy.serialize import SerializationStrategy

from fedllm.core.errors import PayloadError
from fedllm.federation.academy.wire import down, seal, unseal, up

log = logging.getLogger(__name__)
JSON = SerializationStrategy.JSON
AGENT = "fedllm.federation.academy.agent.SiteAgent"
CONFIG = RuntimeConfig(terminate_on_error=False, terminate_on_success=False, raise_loop_errors_on_shutdown=False,
                       default_serializer=JSON, allowed_deserializers={JSON}, max_sync_concurrency=16)
"""JSON alone: a request in pickle is refused before anything of it is read. The mailbox outlives the process."""


class SiteAgent(Agent):
    """Answers for one site. Rows and the model are behind `desk`, which is made in the site's own process."""

    def __init__(self, site: str, key: bytes, desk: Any) -> None:
        super().__init__()
        self.site, self.key, self.desk = site, key, desk

    @action
    async def take(self, number: str, sealed: str) -> str:
        """The answer to one question; empty where the question is not the coordinator's. It never raises: Academy
        would send the traceback."""
        try:
            return await self.agent_run_sync(self.answer, str(number), sealed)
        except Exception:
            log.exception("a question could not be answered")
            return ""

    def answer(self, number: str, sealed: Any) -> str:
        """The same on a thread: work never holds the agent's own loop."""
        try:
            head, body = unseal(self.key, down(self.site, number), sealed)
        except PayloadError as error:
            log.warning("refused: %s", error)
            return ""
        said, data = self.desk.answer(head, body)
        return seal(self.key, up(self.site, number), said, data)

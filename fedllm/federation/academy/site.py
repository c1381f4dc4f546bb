"""`python -m fedllm.federation.academy.site KIT`: a site's resident process, whose agent answers the coordinator.

It lives through the ends of exchanges, so that a model is loaded once for a run. The agent holds no row.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import uuid
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedLLMError
from fedllm.federation.academy.join import CONNECTED
from fedllm.federation.academy.keys import KEY, KIT, read, token
from fedllm.federation.academy.wire import SIZE, check_academy, trusting
from fedllm.federation.watching import there

log = logging.getLogger(__name__)
AGAIN, LONGEST = 0.3, 5.0
"""Seconds from one look for the exchange to the next; after refusals (a site that is suspended) up to so many."""


async def attend(kit: Path, desk: Any) -> None:
    """Answer until this process is ended, at one exchange after the other."""
    from academy.exchange import HttpExchangeFactory
    from academy.exchange.cloud.client import HttpAgentRegistration
    from academy.identifier import AgentId
    from academy.runtime import Runtime

    from fedllm.federation.academy.agent import CONFIG, SiteAgent

    told, key = json.loads(read(kit / KIT)), read(kit / KEY)
    context: Any = trusting(kit / "ca.crt")
    registration = HttpAgentRegistration(agent_id=AgentId(uid=uuid.UUID(told["agent"]), name=told["site"]))
    pause = AGAIN
    while True:
        if not await asyncio.to_thread(there, told["address"]):
            await asyncio.sleep(AGAIN)
            continue
        factory = HttpExchangeFactory(f"https://{told['address']}", ssl_verify=context, retries=0,
                                      additional_headers={"Authorization": f"Bearer {token(key)}"})
        runtime = Runtime(SiteAgent(told["site"], key, desk), exchange_factory=factory, registration=registration,
                          config=CONFIG)
        try:
            async with runtime:
                log.info(CONNECTED)
                pause = AGAIN
                await runtime.wait_shutdown()
        except Exception as error:  # the exchange ended, or refuses: the next one is waited for
            log.debug("not at the exchange: %s: %s", type(error).__name__, error)
            pause = min(2 * pause, LONGEST)
        await asyncio.sleep(pause)


def main() -> None:
    """Serve the kit's site."""
    import torch

    from fedllm.engines.far.desk import Desk
    from fedllm.federation.network import close
    from fedllm.federation.settings import SETTINGS, SiteSettings
    from fedllm.federation.site import open_run
    from fedllm.federation.watching import Teller

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for chatty in ("academy", "httpx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("academy.exchange.cloud.client").setLevel(logging.CRITICAL)  # each look in vain, with a traceback
    check_academy()
    kit = Path(sys.argv[1])
    told = json.loads(read(kit / KIT))
    settings = SiteSettings.read(kit / "local" / SETTINGS)
    close(settings, [str(told["address"]).rpartition(":")[0]])
    torch.set_num_threads(settings.threads)
    desk = Desk(lambda head: open_run(head, told["site"], SiteSettings.read(kit / "local" / SETTINGS)),
                tell=Teller(kit), piece=SIZE)
    asyncio.run(attend(kit, desk))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FedLLMError as error:
        sys.exit(f"{type(error).__name__}: {error}")

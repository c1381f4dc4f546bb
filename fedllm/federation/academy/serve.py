"""The coordinator's side on Academy: `serve` starts an exchange, waits for the sites' agents, and drives the run."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.core.errors import RunFailed
from fedllm.engines.far.line import Link, Patience, Silence
from fedllm.engines.far.pieces import InPieces
from fedllm.engines.far.sites import PROTOCOL
from fedllm.federation.academy.keys import AcademyFederation
from fedllm.federation.academy.link import START, AcademyLink
from fedllm.federation.academy.wire import SIZE, check_academy
from fedllm.federation.answering import Desk, answer_questions
from fedllm.federation.coordinator import drive_run
from fedllm.federation.process import end_tree, need_port
from fedllm.federation.watching import there
from fedllm.runs.progress import log as progress
from fedllm.runs.result import Result
from fedllm.runs.watch import begun

log = logging.getLogger(__name__)


def serve_folder(run: Path, federation: Path, needed: int | None = None, wait: float = 600.0,
                 patience: Patience | None = None, desk: Desk | None = None) -> Result:
    """Begin the run in a folder, or go on with it: an exchange for as long as it takes. At `desk` questions are then
    answered, until this process ends."""
    keys = AcademyFederation(federation)
    with exchange(keys) as link:
        return carry_out_academy(keys, link, run, needed, wait, patience, desk)


def carry_out_academy(keys: AcademyFederation, link: AcademyLink, run: Path, needed: int | None = None,
                      wait: float = 600.0, patience: Patience | None = None, desk: Desk | None = None) -> Result:
    """A run on an exchange that is up, with the sites that are there once `needed` are."""
    sites = [site for site in link.sites if not keys.barred(site)]
    needed = len(sites) if needed is None else needed
    here = await_agents(link, sites, needed, wait)
    after = desk and functools.partial(answer_questions, desk=desk, name=run.name)
    return drive_run(run, InPieces(link, SIZE), here, needed, patience or Patience(probe=5.0), kind="academy",
                     after=after)


@contextlib.contextmanager
def exchange(keys: AcademyFederation) -> Iterator[AcademyLink]:
    """Academy's exchange while the block runs, in a process of its own, and the line through it."""
    check_academy()
    port = int(keys.spec["port"])
    need_port(port, "Academy's exchange")
    with (keys.folder / "exchange.log").open("ab") as out:
        process = begun(["fedllm.federation.academy.exchange", str(keys.folder)], out)
    try:
        ends = time.monotonic() + START
        while not there(f"localhost:{port}"):
            if process.poll() is not None or time.monotonic() > ends:
                raise RunFailed(f"Academy's exchange did not begin; see {keys.folder / 'exchange.log'}")
            time.sleep(0.1)
        link = AcademyLink(keys)
        try:
            yield link
        finally:
            link.close()
    finally:
        end_tree(process.pid)
        process.wait(30)


def await_agents(link: Link, sites: Sequence[str], needed: int, wait: float) -> list[str]:
    """The sites that are there, once there are `needed`; RunError when that takes longer than `wait` seconds."""
    ends, here, before = time.monotonic() + wait, set[str](), -1
    while True:
        for site in (s for s in sites if s not in here):
            with contextlib.suppress(Silence):
                link.call(site, {"op": "probe", "protocol": PROTOCOL}, b"", 1.0)
                here.add(site)
        if len(here) != before:
            before = len(here)
            progress.info("%d of %d sites are here (%s)", before, needed, ", ".join(sorted(here)) or "none")
        if len(here) >= needed:
            return sorted(here)
        if time.monotonic() > ends:
            raise RunFailed(f"{len(here)} of {needed} sites joined in {wait:g} s ({', '.join(sorted(here)) or 'none'})")
        time.sleep(0.2)

"""The far sites as the server sees them: who lives, who is suspect, and one call that outlives a site's restart.

No NVFlare here: a `Link` carries bytes to one site and back, and tests use one made of threads.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedllm.core.aside import started
from fedllm.engines.far.line import Barred, Body, Head, Link, Patience, Silence, Unsent

log = logging.getLogger(__name__)
T = TypeVar("T")
PROTOCOL = 3
GIVEN_UP = "it was given up"
"""Why there is no answer for which nobody waits any longer."""


@dataclass
class Site:
    """What the server knows of one site."""

    name: str
    boot: str | None = None
    """Changes with every start of the site's process."""
    suspect: str | None = None
    """Why it is suspected of being gone."""
    since: float = 0.0
    revived: float = 0.0
    settled: list[list[Any]] = field(default_factory=list)
    """Rounds that counted, as [attempt, round], of which the site has not heard yet."""
    dropped: list[list[Any]] = field(default_factory=list)
    """Visits whose answers were given up, as [attempt, visit], of which it has not heard yet."""


class Ended(threading.Event):
    """The end of one sending; the end of the whole call, `over`, is one too."""

    def __init__(self, over: threading.Event) -> None:
        super().__init__()
        self.over = over

    def is_set(self) -> bool:
        return super().is_set() or self.over.is_set()


class Sites:
    """The liveness table, and calls to sites that come to an end whatever happens."""

    def __init__(self, link: Link, names: Sequence[str], patience: Patience | None = None) -> None:
        self.link, self.patience = link, patience or Patience()
        self.table = {name: Site(name) for name in names}
        self.id = uuid.uuid4().hex  # a coordinator that is started again has another
        self._lock, self._calls = threading.Lock(), set[threading.Event]()
        self.reopen: Callable[[str], None] = lambda site: None
        """Called when a site has a new process that does not know the run yet."""
        self.on_event: Callable[..., None] = lambda kind, **facts: None

    def ask(self, name: str, head: Head, body: Body, seconds: float | None, over: threading.Event | None = None
            ) -> tuple[Head, Body, int]:
        """The site's answer and how often the message was sent; raises `Silence` at the deadline at the latest, and
        soon after `over` is set.

        A site that dies and comes back in time is asked again: equal rounds and visits give equal answers.
        """
        over = over or threading.Event()
        with self._lock:
            self._calls.add(over)
        try:
            return self._answer(name, head, body, seconds, over)
        finally:
            with self._lock:
                self._calls.discard(over)

    def hang_up(self) -> None:
        """Nobody waits for anything any longer."""
        with self._lock:
            for over in self._calls:
                over.set()

    def _answer(self, name: str, head: Head, body: Body, seconds: float | None, over: threading.Event
                ) -> tuple[Head, Body, int]:
        site, ends = self.table[name], time.monotonic() + (seconds or self.patience.answer)
        if site.suspect and not self._taken_back(site, ends):
            raise Unsent(f"{site.suspect}; no sign of life in {self.patience.probe:g} s")
        sent = 0
        while True:
            sent += 1
            with self._lock:  # what this very attempt leaves is settled when its work is done
                told = {"settled": [s for s in site.settled if s[0] != head.get("attempt")],
                        "dropped": list(site.dropped)}
            got = self._once(site, {**head, **told}, body, ends, over)
            if got is None:
                if sent == 3:
                    log.warning("site '%s' lives and its answers break off; it is asked again until the deadline, in "
                                "%.0f s", name, max(0.0, ends - time.monotonic()))
                over.wait(min(self.patience.every, 0.05 * 2 ** min(sent, 10)))
                continue
            if got[0].get("closed"):
                self._open_again(site, ends)
                continue
            with self._lock:
                site.settled = [s for s in site.settled if s not in told["settled"]]
                site.dropped = [d for d in site.dropped if d not in told["dropped"]]
            return *got, sent

    def probe(self, name: str) -> str | None:
        """The boot id of the site's process, or None when it gives no sign of life."""
        try:
            head, _ = self.link.call(name, {"op": "probe", "protocol": PROTOCOL}, b"", self.patience.probe)
        except Silence:
            self._revive(self.table[name])
            return None
        return str(head.get("boot"))

    def look_after(self, name: str) -> bool:
        """Whether a site that was silent is back; a process that died is asked for again, and a new one is given the
        run. Raises `Silence` where that fails."""
        site, boot = self.table[name], self.probe(name)
        if boot is None:
            return False
        if boot != site.boot:
            self.on_event("reopened", client=name)
            self.reopen(name)
        self._back(site, boot)
        return True

    def _revive(self, site: Site) -> None:
        """Not before the site has lived once: it may still be starting."""
        now = time.monotonic()
        if site.boot is not None and now - site.revived >= self.patience.revive:
            site.revived = now
            self.link.revive(site.name)

    def settle(self, name: str, attempt: str, round: int) -> None:
        """What this site staged in `attempt` counts; it hears of it with the next message."""
        with self._lock:
            self.table[name].settled.append([attempt, round])

    def drop(self, name: str, attempt: str, visit: str) -> None:
        """Nobody waits for this visit's answer any longer, and it does not count: the site hears of it at once, so that
        it can stop, and once more with the next message, since this one may be lost."""
        if name not in self.table:
            return
        with self._lock:
            self.table[name].dropped.append([attempt, visit])
        head = {"op": "drop", "protocol": PROTOCOL, "visits": [[attempt, visit]]}
        started(lambda: self.link.call(name, head, b"", self.patience.probe))

    def remind(self, name: str, settled: Sequence[Sequence[Any]], dropped: Sequence[Sequence[Any]] = ()) -> None:
        """This site may not have heard that these counted and those did not; to hear it twice does nothing."""
        if name not in self.table:
            return
        with self._lock:
            site = self.table[name]
            for known, told in ((site.settled, settled), (site.dropped, dropped)):
                known[:0] = [list(t) for t in told if list(t) not in known]

    def _once(self, site: Site, head: Head, body: Body, ends: float, over: threading.Event
              ) -> tuple[Head, Body] | None:
        """One sending, watched; None when it must be sent again."""
        left = ends - time.monotonic()
        if left <= 0:
            raise self._give_up(site, "its deadline passed")
        ended = Ended(over)
        call = started(lambda: self.link.call(site.name, head, body, left, ended))
        try:
            return self._watched(site, call, ends, ended)
        finally:
            ended.set()  # nobody waits for an answer of a process that is gone

    def _watched(self, site: Site, call: Future[tuple[Head, Body]], ends: float, over: threading.Event
                 ) -> tuple[Head, Body] | None:
        """Wait for a call and look for signs of life meanwhile."""
        gone: float | None = None
        while True:
            left = ends - time.monotonic()
            failed = False
            try:
                return call.result(max(0.0, min(self.patience.every, left)))
            except NotYet:
                failed = call.done() and call.exception() is not None  # a timeout of the line's own
                if left <= 0:
                    raise self._give_up(site, "it was silent until the deadline") from None
            except Barred as why:
                raise self._give_up(site, str(why)) from None
            except Silence:
                failed = True
                if ends - time.monotonic() <= 0:
                    raise self._give_up(site, "it was silent until the deadline") from None
            if over.is_set():
                raise Silence(GIVEN_UP)
            boot = self.probe(site.name)
            if boot is None:
                gone = gone or time.monotonic()
                if time.monotonic() - gone >= self.patience.grace:
                    raise self._give_up(site, f"it was gone for {self.patience.grace:g} s in the middle of its work")
                if failed:
                    call = started(lambda: self._sign_of_life(site, ends, over))
                continue
            if failed or boot != site.boot:
                self._back(site, boot)
                return None
            gone = None

    def _sign_of_life(self, site: Site, ends: float, over: threading.Event) -> tuple[Head, Body]:
        """Stands in for a call that failed: ends with `Silence` at the site's next sign of life."""
        while time.monotonic() < ends and not over.is_set() and self.probe(site.name) is None:
            time.sleep(min(1.0, self.patience.probe))
        raise Silence("the call broke off")

    def _open_again(self, site: Site, ends: float) -> None:
        """Give a new process the run; a model that loads beyond the deadline goes on loading for the next round."""
        log.info("site '%s' has a new process; it gets the run again", site.name)
        self.on_event("reopened", client=site.name)

        def open_run() -> tuple[Head, Body]:
            self.reopen(site.name)
            return {}, b""

        try:
            started(open_run).result(max(0.0, ends - time.monotonic()))
        except NotYet:
            raise self._give_up(site, "its deadline passed while a new process loaded the model") from None

    def _taken_back(self, site: Site, ends: float) -> bool:
        boot = self.probe(site.name) if time.monotonic() < ends else None
        if boot is not None:
            self._back(site, boot)
        return boot is not None

    def _back(self, site: Site, boot: str) -> None:
        if site.suspect:
            self.on_event("back", client=site.name, after=round(time.monotonic() - site.since, 3))
        site.boot, site.suspect = boot, None

    def _give_up(self, site: Site, why: str) -> Silence:
        if not site.suspect:
            site.since = time.monotonic()
            self.on_event("suspect", client=site.name, why=why)
        site.suspect = f"suspect: {why}" if not why.startswith("suspect") else why
        return Silence(why)

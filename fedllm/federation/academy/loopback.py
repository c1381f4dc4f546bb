"""An Academy federation of real processes on this machine, with TLS, tokens and sealed messages: for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from fedllm.engines.far.line import Patience
from fedllm.federation.academy import serve as academy_serve
from fedllm.federation.academy.keys import new_academy_federation
from fedllm.federation.nvflare.loopback import SITES, Loopback, joined
from fedllm.runs.result import Result


class AcademyLoopback(Loopback):
    """The rows, sites and recipes of `Loopback`, behind an exchange."""

    link: Any

    def _keys(self, folder: Path, host: str) -> Any:
        return new_academy_federation(folder, self.sites, host, self.port)

    def run_folder(self, recipe: Mapping[str, Any]) -> Path:
        """A run's folder, not begun yet."""
        return super().run_folder({**recipe, "engine": "academy"})

    def run(self, recipe: Mapping[str, Any], needed: int | None = None, patience: Patience | None = None) -> Result:
        """The result of a run over the exchange that `serving_session` holds."""
        return academy_serve.carry_out_academy(self.keys, self.link, self.run_folder(recipe),
                                               needed or len(self.sites), 240.0, patience)

    def agent(self, site: str) -> int | None:
        """The pid of the site's process with its agent, or None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(self.joins[site].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "fedllm.federation.academy.site" in p.cmdline():
                        return p.pid
        return None

    @contextlib.contextmanager
    def serving_session(self) -> Iterator[None]:
        """An exchange that carries one run after the other, for `run`."""
        with academy_serve.exchange(self.keys) as self.link:
            yield


@contextlib.contextmanager
def academy_loopback(folder: Path, model: str = "embedded", join: bool = True, **more: Any
                     ) -> Iterator[AcademyLoopback]:
    """A federation whose sites have been started, until the block ends."""
    with joined(AcademyLoopback(folder, model, sites=more.pop("sites", SITES), **more), join) as made:
        yield made

"""A Flower federation of real processes on this machine, with TLS and node keys: for benches and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from fedllm.engines.far.line import Patience
from fedllm.federation.flower import serve as flower_serve
from fedllm.federation.flower.keys import new_flower_federation
from fedllm.federation.nvflare.loopback import JOINING, SITES, Loopback, joined
from fedllm.runs.result import Result


class FlowerLoopback(Loopback):
    """The rows, sites and recipes of `Loopback`, behind a SuperLink."""

    nodes: Mapping[str, int]

    def _keys(self, folder: Path, host: str) -> Any:
        return new_flower_federation(folder, self.sites, host, self.port)

    def run_folder(self, recipe: Mapping[str, Any]) -> Path:
        """A run's folder, not begun yet."""
        return super().run_folder({**recipe, "engine": "flower"})

    def run(self, recipe: Mapping[str, Any], needed: int | None = None, patience: Patience | None = None) -> Result:
        """The result of a run on the SuperLink that `serving_session` holds."""
        return flower_serve.carry_out_flower(self.keys, self.nodes, self.run_folder(recipe),
                                             needed or len(self.sites), JOINING, patience)

    def part(self, site: str, module: str) -> int | None:
        """The pid of the site's `supernode` or `desk`, or None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(self.joins[site].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if f"fedllm.federation.flower.{module}" in p.cmdline():
                        return p.pid
        return None

    @contextlib.contextmanager
    def serving_session(self) -> Iterator[None]:
        """A SuperLink that takes one run after the other, for `run`."""
        with flower_serve.superlink(self.keys) as self.nodes:
            yield


@contextlib.contextmanager
def flower_loopback(folder: Path, model: str = "embedded", join: bool = True, **more: Any) -> Iterator[FlowerLoopback]:
    """A federation whose sites have been started, until the block ends."""
    with joined(FlowerLoopback(folder, model, sites=more.pop("sites", SITES), **more), join) as made:
        yield made

"""Ends a process with the one that began it, however that one ended: a killed `fedllm join` leaves nothing behind.

`python -m fedllm.runs.watch PARENT MODULE WORDS...` is MODULE's command line, watched. A look at the parent's
number each second works on every POSIX system and whichever thread began the process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

MAIN = "FEDLLM_MAIN"
"""In the environment of NVFlare's job processes: the number of the main process that began them."""


def end_with(parent: int, every: float = 1.0) -> None:
    """This process ends, within `every` seconds, once `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)  # whatever hangs: nobody is left to whom an orderly end would matter

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_with_main() -> None:
    """In a job process: it ends with its main process (which NVFlare looks for too, but then may hang in its end)."""
    if main := os.environ.get(MAIN):
        end_with(int(main))


def begun(words: Sequence[str], log: IO[bytes], cwd: Path | None = None, **env: str) -> subprocess.Popen[bytes]:
    """A module's command line as a process that ends with this one, however this one ends."""
    return subprocess.Popen([sys.executable, "-m", "fedllm.runs.watch", str(os.getpid()), *words], stdout=log,
                            stderr=log, cwd=cwd, env={**os.environ, **env, "MALLOC_ARENA_MAX": "4"})


def main() -> None:
    """Run a module's command line, ended with the parent."""
    parent, module, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.environ[MAIN] = str(os.getpid())
    end_with(parent)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

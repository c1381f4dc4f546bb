"""What the page can do to a run: end it in order, and begin `fedllm resume` of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from fedllm.core.errors import RunError, plain
from fedllm.dashboard.tail import Odd, read_small
from fedllm.dashboard.watched import LOCKS, held

LOG = "resume.log"
"""In the run's folder: what `fedllm resume` said that was begun from the page."""


def holder(path: Path) -> psutil.Process:
    """The process that works on a folder; RunError when there is none, or it cannot be told which one it is.

    The folder's word is not enough, since it may have come from elsewhere: the process must have the lock open.
    """
    if not held(path):
        raise RunError(f"nobody works on {path}")
    for name in LOCKS:
        try:
            process = psutil.Process(int(read_small(path / name, 64)))
            if any(f.path == os.path.realpath(path / name) for f in process.open_files()):
                return process
        except (Odd, ValueError, OverflowError, psutil.Error):
            continue
    raise RunError(f"{path} is being worked on, and no process of yours on this machine can be told to be it; end it "
                   "where it runs")


def stop(path: Path) -> str:
    """End whoever works on a folder as Ctrl-C does: the run says where it stands, and can be resumed."""
    process = holder(path)
    if process.pid == os.getpid():
        raise RunError("this process itself works on the run")
    how = signal.SIGTERM if deaf(process.pid) else signal.SIGINT
    try:
        process.send_signal(how)
    except psutil.Error as error:
        raise RunError(f"process {process.pid} cannot be ended: {plain(error)}") from None
    if how == signal.SIGTERM:
        return f"process {process.pid} is ended (it hears no Ctrl-C, as what was begun in the background)"
    return f"process {process.pid} is asked to end, as by Ctrl-C"


def deaf(pid: int) -> bool:
    """Whether a process ignores Ctrl-C, as a shell without job control begins what it puts into the background."""
    try:
        said = Path(f"/proc/{pid}/status").read_text()
        ignored = next(line for line in said.splitlines() if line.startswith("SigIgn:"))
        return bool(int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    except (OSError, StopIteration, ValueError):
        return False  # no such file on this system


class Resumed:
    """A `fedllm resume` that was begun here; it goes on when the page's process ends."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log, self.pid = process, log, process.pid
        self.code: int | None = None

    def look(self) -> bool:
        """Whether it has just ended."""
        before, self.code = self.code, self.process.poll()
        return self.code != before

    def as_json(self) -> dict[str, Any]:
        """Whether it still runs, and the end of what it said where it failed."""
        said = ""
        if self.code:
            try:
                said = read_small(self.log).decode(errors="replace")[-2000:]
            except Odd as why:
                said = str(why)
        return {"pid": self.pid, "code": self.code, "said": "\n".join(plain(x, 500) for x in said.splitlines())}


def resume(path: Path, says: Mapping[str, Any]) -> Resumed:
    """Begin `fedllm resume PATH`. It runs nothing that the folder's recipe names: such a recipe is refused by it."""
    if says["state"] == "running":
        raise RunError("it is being worked on")
    if says["state"] in ("finished", "failed"):
        raise RunError(f"it is {says['state']}: there is nothing to resume")
    if says["kind"] not in ("run", "stages"):
        raise RunError("the folder has no recipe, so that there is nothing to resume")
    if says["of_sites"]:
        raise RunError(f"it is a run of a real federation: `fedllm serve {path} --federation FOLDER` goes on with it")
    try:
        file = os.open(path / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise RunError(f"{path / LOG} cannot be written: {error.strerror}") from None
    with os.fdopen(file, "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "fedllm.cli.main", "resume", str(path)], stdout=log,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    return Resumed(process, path / LOG)

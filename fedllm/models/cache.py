"""Folders that are made once and kept under the user's cache: written whole or not at all, looked over when read."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedllm.core.errors import ModelError

log = logging.getLogger(__name__)
LIST = "made.json"
PATIENCE = 600.0
"""Seconds to wait for another process that makes the same folder; after that this one makes it for itself."""
CHUNK = 1 << 24
NOT_TAKEN = (OSError, SafetensorError)
"""What comes of a disk that is full or may not be written: safetensors has an error of its own for it."""


def why(error: BaseException) -> str:
    """Why a disk did not take something, as one line."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1]).partition(": '")[0]  # of many files, the first
    if isinstance(error, OSError) and error.errno is None and " written" in str(error):
        return f"the disk is full, or a limit was reached ({error})"  # numpy's word for half an array
    return str(getattr(error, "strerror", None) or error)


@functools.cache
def cannot_be_kept(cache: Path, reason: str) -> None:
    """Say once that nothing is kept."""
    log.warning("the cache %s cannot be written (%s): what would lie there is made anew in each process; set "
                "XDG_CACHE_HOME to a folder that can", cache, reason)


def home() -> Path:
    """Where the cache lies: `$XDG_CACHE_HOME/fedllm`, or `~/.cache/fedllm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedllm"


def made_once(room: str, key: str, by: str, make: Callable[[Path], None]) -> Path:
    """The folder `room/key` of the cache, made by `make` (which fills an empty folder) where it is not there, whole.

    `by` says what made it: what another version made is made anew. Two processes may ask at once. Where the cache
    cannot be written, it is made in a temporary folder, for this process alone; ModelError where that cannot be either,
    and whatever `make` raises.
    """
    folder = home() / room / key
    if whole(folder, by):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(f"{folder}.lock", timeout=PATIENCE, mode=0o600)
        with contextlib.suppress(Timeout):
            lock.acquire()
        try:
            if not whole(folder, by):
                _make(folder, by, make)
        finally:
            lock.release()
    except NOT_TAKEN as error:
        cannot_be_kept(home(), why(error))
        return _for_now(folder, make)
    return folder


def _for_now(folder: Path, make: Callable[[Path], None]) -> Path:
    try:
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}."))
        atexit.register(shutil.rmtree, part, ignore_errors=True)
        make(part)
    except NOT_TAKEN as error:
        raise ModelError(f"neither {folder} nor {tempfile.gettempdir()} can be written ({why(error)}); set "
                         "XDG_CACHE_HOME to a folder with room") from None
    return part


def _make(folder: Path, by: str, make: Callable[[Path], None]) -> None:
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.", dir=folder.parent))  # for this user alone (0700)
    try:
        make(part)
        files = {p.name: _print_of(p) for p in sorted(part.iterdir())}
        (part / LIST).write_text(json.dumps({"by": by, "files": files}))
        shutil.rmtree(folder, ignore_errors=True)  # what lies there is not whole
        try:
            part.rename(folder)
        except OSError:
            if not whole(folder, by):  # unless another process was quicker
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def whole(folder: Path, by: str) -> bool:
    """Whether every file in this folder is what `by` wrote: by length and checksum."""
    try:
        said = json.loads((folder / LIST).read_text())
        return said["by"] == by and all(_print_of(folder / name) == found for name, found in said["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _print_of(path: Path) -> list[int]:
    size, sum = 0, 0
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            size, sum = size + len(part), zlib.crc32(part, sum)
    return [size, sum]

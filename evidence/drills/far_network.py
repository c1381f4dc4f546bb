"""A network namespace of its own for a site, whose line can be cut."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from fedllm.core.errors import RunError

HOST, FAR, SPACE = "10.77.0.1", "10.77.0.2", "fedllm-far"
"""Addresses on either side of the pair of virtual cards, and the name of the far network namespace."""


@contextlib.contextmanager
def namespace() -> Iterator[tuple[str, ...]]:
    """A network namespace joined to this one by a pair of virtual cards; gives the words that run a command in it."""
    ip("netns", "add", SPACE)
    try:
        ip("link", "add", "fedllm0", "type", "veth", "peer", "name", "fedllm1", "netns", SPACE)
        inside = ("ip", "netns", "exec", SPACE)
        for words in (("addr", "add", f"{HOST}/24", "dev", "fedllm0"), ("link", "set", "fedllm0", "up")):
            ip(*words)
        for words in (("addr", "add", f"{FAR}/24", "dev", "fedllm1"), ("link", "set", "fedllm1", "up"),
                      ("link", "set", "lo", "up")):
            ip("-n", SPACE, *words)
        yield inside
    finally:
        ip("netns", "del", SPACE)


def ip(*words: str) -> None:
    """Run `ip` with these words; RunError with what it said where it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise RunError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode} (it needs root and iproute2)")

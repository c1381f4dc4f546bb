"""One random stream per (seed, round, client, owner): adding a layer never moves another owner's draws.

Cryptography does not come here: keys and masks take the operating system's randomness.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every element of `key` (their `repr`) and on nothing else."""
    text = "\x1f".join(repr(k) for k in key).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def torch_stream(*key: object) -> torch.Generator:
    """A CPU torch generator for this key."""
    return torch.Generator().manual_seed(seed_of(*key))


def numpy_stream(*key: object) -> np.random.Generator:
    """A numpy generator for this key."""
    return np.random.Generator(np.random.PCG64(seed_of(*key)))


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def torch_own(seed: int | None = None) -> Iterator[None]:
    """Let code that is not ours draw from torch's own stream, which the process has once: from `seed` where there is
    one; one thread at a time, and afterwards the stream is where it was."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield

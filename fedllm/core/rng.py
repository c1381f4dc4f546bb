"""One random stream per (seed, round, client, owner): adding a layer never moves another owner's draws.

Cryptography does not come here: keys and masks take the operating system's randomness.
"""

from __future__ import annotations

import hashlib

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

"""Discrete Gaussian noise: whole numbers k with probability in proportion to exp(-k^2 / (2 std^2))."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Words = np.ndarray[Any, np.dtype[np.uint64]]


class Coins:
    """Random words of 64 bits: AES-128 in counter mode under a key of the operating system's, or one that is given."""

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Cipher(algorithms.AES(key or secrets.token_bytes(16)), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def of(cls, *key: object) -> Coins:
        """The same words for the same key: for tests, and for what must be drawn again after a crash."""
        return cls(hashlib.sha256(repr(key).encode()).digest()[:16])

    def words(self, n: int) -> Words:
        """[n], uniform."""
        return np.frombuffer(self._stream.update(bytes(8 * n)), np.uint64)

    def below(self, t: int, n: int) -> Words:
        """[n], uniform on 0 .. t - 1 but for t / 2^64."""
        return self.words(n) % np.uint64(t)

    def shares(self, n: int) -> np.ndarray:
        """[n], uniform on (0, 1], in steps of 2^-53."""
        return ((self.words(n) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def discrete_gaussian(coins: Coins, shape: Sequence[int], std: float) -> np.ndarray:
    """int64 of this shape, each its own draw (Canonne, Kairouz and Steinke, NeurIPS 2020, 2004.00010, algorithm 3).

    Coins of a chance p are 53-bit numbers against p, so that a draw is within 2^-50 of the law in total variation.
    """
    want = math.prod(shape)
    t = math.floor(std) + 1
    found: list[np.ndarray] = []
    have = 0
    while have < want:
        got = _proposals(coins, t, std, 64 + 3 * (want - have))
        found.append(got)
        have += len(got)
    return np.concatenate(found)[:want].reshape(tuple(shape)) if found else np.zeros(tuple(shape), np.int64)


def _proposals(coins: Coins, t: int, std: float, n: int) -> np.ndarray:
    """Those of n tries that are accepted."""
    # discrete Laplace of scale t: U + t V with U kept by exp(-U / t), V geometric of e^-1, a sign, and one zero
    u = coins.below(t, n)
    kept = coins.shares(n) <= np.exp(-u.astype(np.float64) / t)
    v = np.floor(-np.log(coins.shares(n))).astype(np.int64)
    x = u.astype(np.int64) + t * v
    minus = (coins.words(n) & np.uint64(1)).astype(bool)
    kept &= ~(minus & (x == 0))
    # accepted by exp(-(|x| - std^2 / t)^2 / (2 std^2))
    kept &= coins.shares(n) <= np.exp(-((x - std * std / t) ** 2) / (2 * std * std))
    return np.where(minus, -x, x)[kept]

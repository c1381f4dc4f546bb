"""Shamir's t-of-n sharing of 32-byte secrets over the prime field of 2^256 + 297."""

from __future__ import annotations

import functools
import itertools
import secrets
from collections.abc import Callable, Mapping

PRIME = 2**256 + 297
SIZE = 33
"""Bytes of a share."""
TRIES = 500


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares at x = 1 .. count; any `threshold` of them give the 32-byte secret, fewer say nothing."""
    poly = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        y = 0
        for a in reversed(poly):
            y = (y * x + a) % PRIME
        shares.append(y.to_bytes(SIZE, "big"))
    return shares


@functools.lru_cache(maxsize=256)
def _weights(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at zero."""
    out = []
    for i in xs:
        up = down = 1
        for j in xs:
            if j != i:
                up, down = up * j % PRIME, down * (j - i) % PRIME
        out.append(up * pow(down, -1, PRIME) % PRIME)
    return tuple(out)


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly as many shares (by x) as the threshold; wrong shares give a wrong secret."""
    xs = tuple(sorted(shares))
    y = sum(w * int.from_bytes(shares[x], "big") for x, w in zip(xs, _weights(xs), strict=True)) % PRIME
    return y.to_bytes(SIZE, "big")[-32:]


def recover(shares: Mapping[int, bytes], threshold: int,
            good: Callable[[bytes], bool]) -> tuple[bytes, set[int]] | None:
    """The secret that `good` accepts, and the xs whose shares are wrong; None when no subset tried gives it."""
    xs = sorted(shares)
    for chosen in itertools.islice(itertools.combinations(xs, threshold), TRIES):
        secret = combine({x: shares[x] for x in chosen})
        if good(secret):
            sure = chosen[1:]
            others = set(xs) - set(chosen)
            return secret, {x for x in others if not good(combine({y: shares[y] for y in (*sure, x)}))}
    return None

"""Fixed point in the ring of integers mod 2^32, and masks from AES: what secure aggregation adds up.

Tensors become `round(x * 2^f)` in int32, whose wrap-around is the ring. Numbers, such as a client's weight, are cut
into four limbs of 16 bits, so that they keep 2^-20 over a range of 2^41 next to tensors with a narrow clip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.payload import Payload
from fedllm.core.reduce import Sum, wide
from fedllm.core.sums import WHOLE
from fedllm.wire.codec import DTYPES, NAMES

CHUNK = 1 << 17  # ring elements that are worked on while they sit in the cache
LIMB, LIMBS, BIAS, POINT = 16, 4, 1 << 62, 20
MOST = 1 << 15
"""Clients in a sum: more could overflow a limb."""


def fraction_bits(clip: float, count: int, quantum: float | None, who: str) -> int:
    """f of the quantum 2^-f at which `count` clients' entries of at most `clip` cannot overflow the ring.

    With `quantum` None the finest that fits; a quantum that does not fit is refused.
    """
    if count > MOST:
        raise CompositionError(f"{who} sums at most {MOST} clients and {count} are asked; lower clients.per_round")
    fits = 30 - math.floor(math.log2(clip * count))
    wanted = fits if quantum is None else math.ceil(-math.log2(quantum) - 1e-9)
    if count * (clip * 2.0**wanted + 0.5) >= 2**31 or not -100 < wanted < 100:
        raise CompositionError(f"{who}: {count} clients with entries up to clip = {clip:g} at quantum {quantum:g} "
                               f"overflow the ring of 2^32; the finest quantum that fits is {2.0**-fits:g}, or lower "
                               "the clip")
    return wanted


def encode(lifted: Payload, f: int, clip: float, who: str) -> tuple[Tensor, str]:
    """One int32 vector and its layout (JSON). An entry beyond the clip, or none at all, is refused and named."""
    tensors = {k: wide(v) for k, v in lifted.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in lifted.items() if not isinstance(v, Tensor)}
    out = torch.empty(sum(t.numel() for t in tensors.values()) + LIMBS * len(numbers), dtype=torch.int32)
    at = 0
    for key, t in tensors.items():
        flat = t.detach().reshape(-1).cpu()
        if key.startswith(WHOLE):
            out[at : at + t.numel()] = _in_ring(flat, key)
            at += t.numel()
            continue
        _to_ring(flat if flat.is_floating_point() else flat.double(), out[at : at + t.numel()], f, clip, key, who)
        at += t.numel()
    for key, v in numbers.items():
        out[at : at + LIMBS] = torch.tensor(_limbs(v, key), dtype=torch.int32)
        at += LIMBS
    rows = [[k, NAMES[t.dtype], list(t.shape)] for k, t in tensors.items()] + [[k, None, None] for k in numbers]
    return out, json.dumps(rows)


def within(lifted: Payload, clip: float, largest: list[float]) -> dict[str, Any]:
    """The payload cut to the clip, its largest |entry| noted."""
    real = {k: v for k, v in lifted.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    largest[0] = max(largest[0], *(float(v.abs().max().nan_to_num(math.inf)) for v in real.values()), 0.0)
    return {k: v.clamp(-clip, clip) if k in real else v for k, v in lifted.items()}


def _in_ring(x: Tensor, key: str) -> Tensor:
    if x.dtype != torch.int32:
        raise PayloadError(f"'{key}' is {x.dtype}; what is in the ring already is int32")
    return x


def _to_ring(x: Tensor, out: Tensor, f: int, clip: float, key: str, who: str) -> None:
    """A power of two scales without an error of its own, so rounding is the only loss."""
    scale, limit = 2.0**f, clip * 2.0**f
    buffer = torch.empty(min(CHUNK, len(x)), dtype=x.dtype)
    for i in range(0, len(x), CHUNK):
        part = x[i : i + CHUNK]
        b = torch.mul(part, scale, out=buffer[: len(part)])
        low, high = (float(v) for v in torch.aminmax(b))
        if not max(-low, high) <= limit:  # NaN fails too
            raise PayloadError(f"{who}: '{key}' holds {max(-low, high) / scale:.6g} and clip = {clip:g} is the most "
                               "that the ring has room for; raise the clip, or clip first with dp_fedavg")
        out[i : i + len(part)].copy_(b.round_())


def _limbs(v: Any, key: str) -> list[int]:
    fixed = round(float(v) * 2**POINT) + BIAS if math.isfinite(v) else -1
    if not 0 <= fixed < 2 * BIAS:
        raise PayloadError(f"'{key}' = {v!r} has no place in a sum of 63-bit fixed-point numbers")
    return [(fixed >> (LIMB * i)) & (2**LIMB - 1) for i in range(LIMBS)]


def decode(ring: Tensor, layout: str, f: int, count: int) -> dict[str, Any]:
    """The sum of `count` encoded payloads, in the types they had."""
    out: dict[str, Any] = {}
    at = 0
    for key, dtype, shape in json.loads(layout):
        if dtype is None:
            limbs = ring[at : at + LIMBS].tolist()
            out[key] = (sum(x << (LIMB * i) for i, x in enumerate(limbs)) - count * BIAS) / 2**POINT
            at += LIMBS
            continue
        n = math.prod(shape)
        kind = DTYPES[dtype]
        if key.startswith(WHOLE):
            out[key] = ring[at : at + n].clone().view(shape)
            at += n
            continue
        real = kind if kind.is_floating_point else torch.float64
        out[key] = ring[at : at + n].to(real).mul_(2.0**-f).to(kind).view(shape)
        at += n
    return out


def mask_(ring: Tensor, keys: Iterable[tuple[bytes, int]]) -> Tensor:
    """Add sign * AES-CTR(key) to the ring vector, in place, for each (16-byte key, sign)."""
    scratch = torch.empty(min(CHUNK, len(ring)), dtype=torch.int32)
    zeros, noise = memoryview(bytes(4 * len(scratch))), memoryview(scratch.numpy().view("u1"))
    streams = [(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), sign) for key, sign in keys]
    for i in range(0, len(ring), CHUNK):
        part = ring[i : i + CHUNK]
        n = len(part)
        for stream, sign in streams:  # the chunk stays in the cache while all masks go on
            stream.update_into(zeros[: 4 * n], noise[: 4 * n])
            part.add_(scratch[:n], alpha=sign)
    return ring


class RingSum(Sum):
    """Adds masked vectors; all must have one layout."""

    ragged = staticmethod(lambda reply: frozenset({("layout", str(reply.get("layout")))}))

    def lift(self, reply: Payload) -> Payload:
        if "refused" in reply:
            raise PayloadError(str(reply["refused"]))
        return reply

    def done(self, total: Payload) -> Payload:
        return total

    def plus(self, acc: dict[str, Any], lifted: Payload) -> dict[str, Any]:
        ring = lifted["ring"]
        if not isinstance(ring, Tensor) or ring.dtype != torch.int32 or ring.dim() != 1:
            raise PayloadError("a masked reply must be one int32 vector")
        if not acc:
            return {"ring": ring.clone(), "layout": lifted["layout"]}
        if lifted["layout"] != acc["layout"] or ring.shape != acc["ring"].shape:
            raise PayloadError("a masked reply's layout differs from the others'")
        acc["ring"].add_(ring)
        return acc


def chi_square(words: Tensor, bins: int = 256) -> float:
    """Chi-square per degree of freedom of all bytes of int32 words against uniform: near 1 for masks."""
    counts = torch.bincount(words.contiguous().view(torch.uint8).int(), minlength=bins).double()
    expected = counts.sum() / bins
    return float(((counts - expected) ** 2 / expected).sum()) / (bins - 1)

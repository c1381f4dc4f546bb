"""Trees in few bits inside of a method, where both directions are coarse: codes, and one scale a block of a tensor.

Layers (`wire/codec_quant.py`) make what clients send smaller; a method whose server answers in few bits too, and whose
clients stand where the coarse steps led, says so here. Nothing of it adds up, so layers that add, clip or code refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.layer import name_of
from fedllm.core.payload import Payload, Tree, part
from fedllm.core.reduce import Mean
from fedllm.wire.codec_quant import packed, unpacked

BLOCK = 128
WHOLE = 32
"""So many bits stand for numbers as they are."""


def coarse(tree: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """`codes` (uint8, `bits` each) and `scales` (bfloat16, one a block of 128 of a tensor): |x - q s| <= s / 2."""
    codes, scales, top = [], [], 2 ** (bits - 1) - 1
    for x in tree.values():
        flat = x.detach().float().reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        s = (blocks.abs().amax(1) / top * (1 + 2**-7)).to(torch.bfloat16)  # rounded up: no value falls outside
        q = (blocks / s.float().clamp(min=1e-38)[:, None]).round().clamp_(-top, top) + top
        codes.append(packed(q.to(torch.uint8).view(-1), bits))
        scales.append(s)
    return {"codes": torch.cat(codes), "scales": torch.cat(scales)}


def fine(codes: Tensor, scales: Tensor, like: Mapping[str, Tensor], bits: int) -> Tree:
    """The tree again, in the names, shapes and types of `like`; PayloadError for codes of anything else."""
    counts = {n: -(-x.numel() // BLOCK) for n, x in like.items()}
    blocks = sum(counts.values())
    if codes.dtype != torch.uint8 or codes.shape != (blocks * BLOCK * bits // 8,) or scales.shape != (blocks,):
        raise PayloadError(f"{tuple(codes.shape)} codes and {tuple(scales.shape)} scales are not those of {blocks} "
                           f"blocks of {BLOCK} numbers of {bits} bits")
    top = 2 ** (bits - 1) - 1
    whole = (unpacked(codes, bits).view(blocks, BLOCK).float() - top) * scales.float()[:, None]
    out, at = {}, 0
    for name, x in like.items():
        out[name] = whole[at : at + counts[name]].reshape(-1)[: x.numel()].view(x.shape).to(x.dtype)
        at += counts[name]
    return out


@dataclass(frozen=True)
class MeanOfCoarse(Mean):
    """The mean of what replies' `codes` and `scales` say of a tree like `like`; its key is `delta/<name>`."""

    like: Mapping[str, Tensor] | None = None
    bits: int = 8

    def lift(self, reply: Payload) -> Payload:
        return super().lift(self._read(reply))

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        return super().add(acc, self._read(reply))

    def _read(self, reply: Payload) -> Payload:
        like = self.like or {}
        if "codes" not in reply:  # as they are; or read already
            got = {n: tuple(t.shape) for n, t in part(reply, "delta").items()}
            if got != {n: tuple(t.shape) for n, t in like.items()}:
                raise PayloadError(f"'delta' holds {len(got)} tensors, and not the {len(like)} that are asked for")
            return reply
        if self.bits == WHOLE or "scales" not in reply:
            raise PayloadError("'codes' came without 'scales', or where numbers were asked for")
        tree = fine(reply["codes"], reply["scales"], like, self.bits)
        rest = {k: v for k, v in reply.items() if k not in ("codes", "scales")}
        return rest | {f"delta/{n}": t for n, t in tree.items()}


def refuse_codes(method: Any, layers: Sequence[Any], instead: str) -> None:
    """CompositionError for a layer that reads tensors of a reply as numbers."""
    for layer in layers:
        if layer.algebra.kind in ("dp", "secagg", "he", "robust", "codec"):
            raise CompositionError(f"layer '{name_of(layer)}' reads replies as numbers, and "
                                   f"'{name_of(method)}' sends codes of few bits, so they do not fit together; "
                                   f"use {instead}")

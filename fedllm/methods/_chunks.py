"""Chunked top-k in two bits a value: the largest k of every 4,096 entries, their places in 12 bits each.

A tensor is cut into chunks of its own; of its last, shorter one the same share is kept, one entry at least. Values are
sorted into 2^bits bins of six standard deviations together, and each bin is told once a tensor, as the mean of what
lies in it (SparseLoCo's quantizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload, Tree
from fedllm.wire.codec_quant import packed, unpacked


@dataclass(frozen=True)
class Chunks:
    """How trees are made sparse: `k` of `size` entries (at most 4,096), in `bits` a value (32: as they are)."""

    size: int
    k: int
    bits: int

    def kept(self, n: int) -> list[int]:
        """How many entries of each chunk of a tensor of n entries go."""
        whole, rest = divmod(n, self.size)
        return [self.k] * whole + ([-(-self.k * rest // self.size)] if rest else [])

    def sparse(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`at` (places within chunks, 12 bits each), `values` (codes of `bits`, or numbers), `table` [tensors, 2^bits].
        """
        at, values, tables = [], [], []
        for x in tree.values():
            flat = x.detach().reshape(-1)
            places = self._largest(flat.abs())
            at.append(places)
            start = torch.repeat_interleave(torch.arange(len(self.kept(len(flat)))), torch.tensor(
                self.kept(len(flat)))) * self.size
            v = flat[places + start]
            if self.bits < 32:
                code, table = binned(v.float(), self.bits)
                tables.append(table)
                v = code
            values.append(v)
        out = {"at": twelve(torch.cat(at))}
        if self.bits == 32:
            return out | {"values": torch.cat(values)}
        codes = torch.cat(values)
        return out | {"values": packed(torch.nn.functional.pad(codes, (0, -len(codes) % 8)), self.bits),
                      "table": torch.stack(tables)}

    def _largest(self, size: Tensor) -> Tensor:
        """Sorted places of the largest entries within each chunk, one chunk after the other."""
        whole = len(size) // self.size
        parts = []
        if whole:
            top = size[: whole * self.size].view(whole, self.size).topk(self.k, dim=1).indices
            parts.append(top.sort(1).values.reshape(-1))
        if len(size) % self.size:
            last = size[whole * self.size :]
            parts.append(last.topk(self.kept(len(size))[-1]).indices.sort().values)
        return torch.cat(parts)

    def dense(self, told: Payload, like: Mapping[str, Tensor]) -> Tree:
        """The tree again, zero where nothing was told; PayloadError for what is none of `like`'s."""
        kept = {n: self.kept(x.numel()) for n, x in like.items()}
        total = sum(map(sum, kept.values()))
        places = of_twelve(told["at"], total)
        values = told["values"]
        if self.bits < 32:
            self._check(values, told.get("table"), total, len(like))
            codes = unpacked(values, self.bits)[:total].long()
        elif values.shape != (total,):
            raise PayloadError(f"'values' has shape {tuple(values.shape)}, allowed is ({total},)")
        out, done = {}, 0
        for i, (name, x) in enumerate(like.items()):
            counts, n = torch.tensor(kept[name]), sum(kept[name])
            where = places[done : done + n] + torch.repeat_interleave(torch.arange(len(counts)), counts) * self.size
            if n and int(where.max()) >= x.numel():
                raise PayloadError(f"a place of '{name[:80]}' is {int(where.max())}, allowed is < {x.numel()}")
            v = told["table"][i][codes[done : done + n]] if self.bits < 32 else values[done : done + n]
            out[name] = torch.zeros(x.numel(), dtype=x.dtype).scatter_(0, where, v.to(x.dtype)).view(x.shape)
            done += n
        return out

    def _check(self, values: Tensor, table: Tensor | None, total: int, tensors: int) -> None:
        length = -(-total // 8) * self.bits
        if values.dtype != torch.uint8 or values.shape != (length,):
            raise PayloadError(f"'values' is {values.dtype} of {tuple(values.shape)}, allowed is uint8 of ({length},)")
        if table is None or table.shape != (tensors, 2**self.bits):
            raise PayloadError(f"'table' is not of {tensors} tensors and {2**self.bits} bins")


def binned(v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bin of each value (uint8), and the mean of what lies in each bin (an empty one: 0)."""
    count = 2**bits
    mean, sigma = v.mean(), v.std(unbiased=False).clamp(min=1e-38)
    code = ((v - mean) / (6 * sigma / count) + count / 2).floor().clamp(0, count - 1).long()
    sums = torch.zeros(count).index_add_(0, code, v)
    return code.to(torch.uint8), sums / torch.zeros(count).index_add_(0, code, torch.ones_like(v)).clamp(min=1)


def twelve(at: Tensor) -> Tensor:
    """Numbers below 4,096, two in three bytes."""
    a = at.numpy().astype(np.uint16)
    a = np.pad(a, (0, len(a) % 2)).reshape(-1, 2)
    b = np.stack([a[:, 0] & 255, (a[:, 0] >> 8) | ((a[:, 1] & 15) << 4), a[:, 1] >> 4], 1)
    return torch.from_numpy(b.astype(np.uint8).reshape(-1))


def of_twelve(b: Tensor, count: int) -> Tensor:
    """So many numbers again; PayloadError for another number of bytes."""
    if b.dtype != torch.uint8 or b.shape != (3 * -(-count // 2),):
        raise PayloadError(f"'at' is {b.dtype} of {tuple(b.shape)}, allowed is uint8 of ({3 * -(-count // 2)},)")
    t = b.numpy().reshape(-1, 3).astype(np.int64)
    a = np.stack([t[:, 0] | ((t[:, 1] & 15) << 8), (t[:, 1] >> 4) | (t[:, 2] << 4)], 1)
    return torch.from_numpy(a.reshape(-1)[:count])


@dataclass(frozen=True)
class Gathered:
    """All replies as they were sent, by the order in which they came (`sent0`, `sent1`, ...), each of them readable."""

    chunks: Chunks
    like: Mapping[str, Tensor]
    ragged = True

    def zero(self) -> list[Payload]:
        return []

    def add(self, acc: list[Payload], reply: Payload) -> list[Payload]:
        if not isinstance(reply["values"], Tensor):
            raise PayloadError("'values' is a number, allowed is a tensor")
        self.chunks.dense(reply, self.like)  # raises for what could not be read later
        return [*acc, {n: t for n, t in reply.items() if n in ("at", "values", "table")}]

    def done(self, acc: list[Payload]) -> Payload:
        return {"sent": {f"sent{i}": one for i, one in enumerate(acc)}}

"""Short causal attention on a CPU: rotated queries and keys, grouped heads, and rows that may lie end to end."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 256
"""Up to this length plain attention beats the CPU's flash kernel, whose backward is slow."""

QUERIES = 64
"""Queries that look back at once: what lies ahead of a block of them is never computed."""

SCORES = 1 << 18
"""Scores of a block of rows that exist at once: a megabyte, so that they stay in the cache."""

Span = tuple[int, int, int]
"""Where some rows of one length lie: their first token, how many rows, how many tokens each."""


@dataclass(frozen=True)
class Laid:
    """Rows of unequal lengths end to end, K lanes of L tokens: no padding lies between them."""

    spans: tuple[Span, ...]
    lanes: int
    tokens: int
    """L; what a lane lacks of it is filled up at its end, and is in no span."""

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> tuple[Laid, list[list[int]]]:
        """For each lane's row lengths: where they lie, short rows first, and each row's first token."""
        widest = max(map(sum, lengths))
        spans: list[Span] = []
        first = [[0] * len(lane) for lane in lengths]
        for k, lane in enumerate(lengths):
            at = k * widest
            for i in sorted(range(len(lane)), key=lambda i: lane[i]):
                first[k][i] = at
                before = spans[-1] if spans else (0, 0, 0)
                if before[2] == lane[i] and before[0] + before[1] * before[2] == at:
                    spans[-1] = (before[0], before[1] + 1, lane[i])
                else:
                    spans.append((at, 1, lane[i]))
                at += lane[i]
        return cls(tuple(spans), len(lengths), widest), first


class CausalAttention(torch.autograd.Function):
    """Rotate queries and keys, and attend to what came before: q [N, T, H*h], k and v [N, T, G*h] -> [N, T, H*h].

    `spans` say where rows lie among all N*T tokens; cos and sin [1, t, h] are those of the longest. The rotation writes
    straight into the layout that the products want, and grouped heads share their keys in place.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float,
                spans: tuple[Span, ...]) -> Tensor:
        h, kept = cos.shape[-1], list[Tensor]()
        q, k, v = (x.contiguous() for x in (q, k, v))
        spans = _in_pieces(spans, q.shape[-1] // h)
        out, turn = _like(q, spans), (cos * scale, sin * scale)  # queries carry the scale
        for span in spans:
            qs, ks, vs, y = (_rows(x, span, h) for x in (q, k, v, out))
            n, groups, t, _ = ks.shape
            ks = _turned(ks, cos[:, :t], sin[:, :t]).view(n * groups, t, h)
            vs = vs.reshape(n * groups, t, h)
            kept += [ks, vs]
            for a, b in _blocks(t):
                some = _turned(qs[:, :, a:b], *(c[:, a:b] for c in turn)).view(n * groups, -1, h)  # [n*G, H/G*(b-a), h]
                z = torch.bmm(some, ks[:, :b].mT)
                z.view(n * groups, -1, b - a, b)[..., a:].add_(_ahead(b - a, z.dtype))
                p = torch.softmax(z, -1)
                y[:, :, a:b].copy_(torch.bmm(p, vs[:, :b]).view(n, -1, b - a, h))
                kept += [some, p]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.scale, ctx.spans, ctx.widths = scale, spans, [x.shape[-1] for x in (q, k, v)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        kept, h, spans = iter(saved), cos.shape[-1], ctx.spans
        sin = -sin.roll(h // 2, -1)  # the rotation backwards
        turn = cos * ctx.scale, sin * ctx.scale
        grads = [_like(d, spans, w) if need else None
                 for w, need in zip(ctx.widths, ctx.needs_input_grad[:3], strict=True)]
        d = d.contiguous()
        for span in spans:
            ks, vs, t = next(kept), next(kept), span[2]
            dq, dk, dv = (None if x is None else _rows(x, span, h) for x in grads)
            ds_, rows = _rows(d, span, h), [(next(kept), next(kept)) for _ in _blocks(t)]
            gk, gv = torch.empty_like(ks), torch.empty_like(vs)
            for (a, b), (some, p) in zip(reversed(_blocks(t)), reversed(rows), strict=True):  # the last sees all
                y = ds_[:, :, a:b].reshape(some.shape)
                _put(gv, p.mT, y, b == t)
                if dq is None and dk is None:
                    continue
                dz = torch.ops.aten._softmax_backward_data(torch.bmm(y, vs[:, :b].mT), p, -1, p.dtype)
                _put(gk, dz.mT, some, b == t)
                if dq is not None:
                    g = torch.bmm(dz, ks[:, :b]).view(span[1], -1, b - a, h)
                    _rotate(g, turn[0][:, a:b], turn[1][:, a:b], dq[:, :, a:b])
            if dk is not None:
                _rotate(gk.view(dk.shape), cos[:, :t], sin[:, :t], dk)
            if dv is not None:
                dv.copy_(gv.view(dv.shape))
        return *grads, None, None, None, None


def _put(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """out [n, t, h] = left @ right [n, b, h], or of the first b tokens added to what is there."""
    if first:
        torch.bmm(left, right, out=out)
    else:
        out[:, : left.shape[1]].baddbmm_(left, right)


def _like(x: Tensor, spans: Sequence[Span], width: int = 0) -> Tensor:
    """Room for as many tokens as x [N, T, d] has; zeros where spans leave some out."""
    all_ = sum(n * t for _, n, t in spans) == x.shape[0] * x.shape[1]
    return (x.new_empty if all_ else x.new_zeros)(*x.shape[:2], width or x.shape[-1])


def _in_pieces(spans: Sequence[Span], heads: int) -> tuple[Span, ...]:
    """Spans of so few rows that the scores of a block of queries stay in the cache."""
    out = []
    for first, rows, t in spans:
        most = max(1, SCORES // (heads * t * min(t, QUERIES)))
        out += [(first + i * t, min(most, rows - i), t) for i in range(0, rows, most)]
    return tuple(out)


@functools.lru_cache(maxsize=SHORT)
def _blocks(t: int) -> list[tuple[int, int]]:
    """Blocks of queries, of like size: a block sees the keys up to its end."""
    count = max(1, round(t / QUERIES))
    ends = [t * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def _rows(x: Tensor, span: Span, h: int) -> Tensor:
    """[N, T, H*h] -> the span's rows [n, H, t, h], a view."""
    first, n, t = span
    return _heads(x.view(-1, x.shape[-1])[first : first + n * t].view(n, t, -1), h)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate(x, cos, sin, torch.empty(x.shape, dtype=x.dtype))


def readable(m: Any, x: Tensor, turns: Any, mask: Tensor | None) -> bool:
    plain = (mask is not None and mask.dtype == torch.bool and mask.dim() == 4) or (mask is None and x.shape[1] == 1)
    return plain and x.device.type == "cpu" and x.shape[1] <= SHORT and turns[0].shape[-1] == m.head_dim and not (
        torch.is_grad_enabled())


def read(m: Any, x: Tensor, turns: Any, mask: Tensor | None, cache: Any) -> Tensor:
    """Attention of new tokens x [N, T, d] to all that the cache holds; grouped heads share their keys in place."""
    h, t = m.head_dim, x.shape[1]
    cos, sin = (c.to(x.dtype).unsqueeze(1) for c in turns)
    q, k, v = _heads(m.q_proj(x), h), _heads(m.k_proj(x), h), _heads(m.v_proj(x), h)
    q, k = (_rotate(y, cos, sin, torch.empty(y.shape, dtype=y.dtype)) for y in (q, k))
    k, v = (y.flatten(0, 1) for y in cache.update(k, v, m.layer_idx))  # [N*G, t_all, h]
    z = torch.bmm(q.view(len(k), -1, h), k.mT).mul_(m.scaling).view(len(x), -1, t, k.shape[1])
    if mask is not None:  # padding's own rows see nothing, and are nothing to anybody
        z.masked_fill_(~mask[..., : k.shape[1]], torch.finfo(z.dtype).min)
    return _flat(torch.bmm(torch.softmax(z, -1).view(len(k), -1, k.shape[1]), v), t, len(k) // len(x))


def _heads(x: Tensor, h: int) -> Tensor:
    """[N, T, H*h] -> [N, H, T, h], a view."""
    return x.view(*x.shape[:2], -1, h).transpose(1, 2)


def _flat(x: Tensor, t: int, groups: int) -> Tensor:
    """[N*G, H/G*T, h] -> [N, T, H*h]."""
    n = x.shape[0] // groups
    return x.view(n, -1, t, x.shape[-1]).transpose(1, 2).reshape(n, t, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """out = x cos + (-x2, x1) sin, on [N, H, T, h] in any layout."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@functools.lru_cache(maxsize=64)
def _ahead(t: int, dtype: torch.dtype) -> Tensor:
    """0 where a position may look and -inf ahead of it: [t, t]."""
    return torch.full((t, t), float("-inf"), dtype=dtype).triu(1)



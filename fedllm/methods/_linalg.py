"""Low-rank numerics: products that are never multiplied out, their norms and their singular values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
"""U [o, q], S [q] descending, Vt [q, i]."""


def factored_svd(b: Tensor, a: Tensor) -> Svd:
    """SVD of B A from its factors, b [o, R] and a [R, i], in fp64: O((o + i) R^2) instead of O(o i min(o, i))."""
    qb, rb = orthogonal(b.double())  # B = Qb Rb
    qa, ra = orthogonal(a.double().mT)  # A^T = Qa Ra
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)  # B A = Qb (Rb Ra^T) Qa^T
    u, vt = signed(qb @ u, vt @ qa.mT)
    return u.to(b.dtype), s.to(b.dtype), vt.to(a.dtype)


def orthogonal(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, R] = Q R with orthonormal columns in Q: by Cholesky, which is quick, where x is far from singular.

    The Gram matrix squares the condition number, so fp64 keeps about eight digits up to a condition of 10^4. Anything
    worse, such as the zero B of a first round or more columns than rows, goes through Householder's QR.
    """
    lower, failed = torch.linalg.cholesky_ex(x.mT @ x)  # x^T x = L L^T, so R = L^T
    pivots = lower.diagonal()
    if failed or not pivots.min() > 1e-4 * pivots.max():
        return torch.linalg.qr(x)
    return x @ torch.linalg.inv(lower).mT, lower.mT


def dense_svd(m: Tensor) -> Svd:
    """SVD of a matrix that is there as a whole, in fp64."""
    u, s, vt = torch.linalg.svd(m.double(), full_matrices=False)
    u, vt = signed(u, vt)
    return u.to(m.dtype), s.to(m.dtype), vt.to(m.dtype)


def signed(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of an SVD with the largest entry of each row of Vt [q, i] positive: the routine leaves signs to the
    last bits of its input, and a start from U and Vt would hang on the processor and on who shares a batch."""
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return u * sign.mT, vt * sign


def cut(svd: Svd, rank: int, split: Literal["us_v", "balanced"] = "balanced") -> tuple[Tensor, Tensor]:
    """The best B [o, rank] and A [rank, i] for B A = U S Vt; zeros follow where the spectrum is shorter than `rank`."""
    u, s, vt = svd
    q = min(rank, len(s))
    left = s[:q] if split == "us_v" else s[:q].sqrt()
    right = torch.ones_like(left) if split == "us_v" else left
    b, a = u.new_zeros(u.shape[0], rank), vt.new_zeros(rank, vt.shape[1])
    b[:, :q], a[:q] = u[:, :q] * left, right[:, None] * vt[:q]
    return b, a


def product_norm(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """sqrt(sum ||B A||_F^2) over pairs (B, A): ||B A||_F^2 = trace((B^T B)(A A^T))."""
    square = 0.0
    for b, a in pairs:
        b, a = b.double(), a.double()
        square += float(((b.mT @ b) * (a @ a.mT)).sum())  # both Gram matrices are symmetric
    return max(square, 0.0) ** 0.5

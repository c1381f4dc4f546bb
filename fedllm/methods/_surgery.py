"""Around a black box: codes of a text's embeddings in front of it, a linear reading of its logits behind it.

A code's gradient comes from differences of row losses; that of the reading is a true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.payload import Tree

How = Literal["cge", "rge"]


def directions(how: How, dim: int, rng: np.random.Generator) -> Tensor:
    """Where a code is moved to, [dim, dim]: along each coordinate, or along as many Gaussian directions."""
    return torch.eye(dim).double() if how == "cge" else torch.from_numpy(rng.normal(size=(dim, dim)))


def slopes(how: How, losses: Tensor, v: Tensor, h: float) -> Tensor:
    """(l(u + h v) - l(u - h v)) / 2h for losses [2 D, rows], put together to each row's gradient [rows, dim]."""
    up, down = losses.chunk(2)
    g = ((up - down) / (2 * h)).T @ v
    return g if how == "cge" else g / len(v)


def read(said: Tensor, y: Tensor, own: Mapping[str, Tensor], lr: float, steps: int) -> tuple[Tree, float]:
    """So many gradient steps of H on these outputs [rows, classes], and the mean loss before them."""
    w, b, said, first = own["H.weight"], own["H.bias"], said.double(), float(row_losses(said, y, own).mean())
    for _ in range(steps):
        off = (torch.softmax(said @ w.T + b, 1) - F.one_hot(y, len(b))) / len(y)  # d CE / d logits
        w, b = w - lr * off.T @ said, b - lr * off.sum(0)
    return {**own, "H.weight": w, "H.bias": b}, first


def work(learned: Mapping[str, Tensor], tokens: int, steps: int) -> dict[str, Any]:
    """For `client.book`: steps of descent over so many tokens, at 6 operations a weight and token."""
    read = tokens * steps
    return {"tokens": read, "steps": steps, "flops": 6.0 * read * sum(t.numel() for t in learned.values())}


def exact(tree: Mapping[str, Tensor]) -> Tree:
    """In fp64, as differences are worked out."""
    return {n: t.double() for n, t in tree.items()}


def rounded(tree: Mapping[str, Tensor]) -> Tree:
    """In fp32, as it is sent and kept."""
    return {n: t.float() for n, t in tree.items()}


def fresh(size: int, classes: int) -> Tree:
    return {"e": torch.zeros(size), "H.weight": torch.eye(classes), "H.bias": torch.zeros(classes)}


def embedded(rows: Sequence[Any], words: Tensor) -> list[Tensor]:
    """Each row's token embeddings [T, d], fp64."""
    return [words[torch.from_numpy(r.ids).long()].double() for r in rows]


def decoded(codes: Tensor, e: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    """s([z, e]), [T, d], for codes [T, m] and e of the client."""
    return F.linear(torch.cat([codes, e.expand(len(codes), -1)], 1), theta["s.weight"], theta["s.bias"])


def surgery(x: Sequence[Tensor], theta: Mapping[str, Tensor], e: Tensor, move: Tensor) -> list[Tensor]:
    """Each text as the box gets it, with all codes of it and e moved by the parts of `move` [m + |e|]."""
    dz, de = move.split([len(theta["q.bias"]), len(e)])
    return [decoded(F.linear(r, theta["q.weight"], theta["q.bias"]) + dz, e + de, theta) for r in x]


def remapped(said: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """H y + b, fp64."""
    return said.double() @ own["H.weight"].T + own["H.bias"]


def row_losses(said: Tensor, y: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each row: a mean over rows would give all of them the same difference."""
    return F.cross_entropy(remapped(said, own), y, reduction="none")

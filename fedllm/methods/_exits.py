"""Exits after an encoder's blocks: what each says of a text, and when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.method import Star, knob
from fedllm.core.payload import Tree
from fedllm.models.exits import walk


@dataclass(frozen=True)
class Told:
    """An answer, the blocks that ran for it, and how sure it is."""

    question: str
    answer: str
    depth: int
    confidence: float
    clients: tuple[str, ...] = ()
    """None: whoever is asked answers by itself."""


@dataclass(frozen=True)
class Exiting(Star):
    """A method whose answers may end after any block."""

    exit_by: Literal["confidence", "entropy", "patience", "budget"] = knob(
        "confidence", "when an answer ends: the likeliest class is likely enough, entropy (nats) is low enough, so "
        "many exits agree, or so many blocks have run", options=("confidence", "entropy", "patience", "budget"))
    threshold: float = knob(0.8, "confidence: at least; entropy: at most", gt=0, le=1)
    patience: int = knob(2, "patience: exits in a row that say the same", ge=1)
    budget: int = knob(3, "budget: blocks", ge=1)

    def over(self, z: Tensor, said: Sequence[int]) -> bool:
        """Whether an answer ends with these logits [classes]; `said` are the classes of the exits so far, this one's
        the last."""
        p = z.softmax(-1)
        if self.exit_by == "confidence":
            return float(p.max()) >= self.threshold
        if self.exit_by == "entropy":
            return float(-(p * p.clamp_min(1e-30).log()).sum()) <= self.threshold
        if self.exit_by == "budget":
            return len(said) >= self.budget
        return len(said) >= self.patience and len(set(said[-self.patience :])) == 1

    def stop(self, z: Tensor) -> int:
        """The exit (from 1) at which a row ends whose logits are [depth, classes]."""
        said = z.argmax(-1).tolist()
        return next((i for i in range(1, len(z) + 1) if self.over(z[i - 1], said[:i])), len(z))

    def walked(self, model: Any, ids: Tensor, theta: Tree) -> tuple[Tensor, int]:
        """Logits [classes] of one text's ids [T] at the exit where it ends, and how many blocks ran: those behind it
        do not."""
        seen, said, z = list[Tensor](), list[int](), torch.zeros(0)

        def look(c: Tensor) -> bool:
            nonlocal z
            seen.append(c[0].to(theta["head"]))
            z = logits(theta, torch.stack(seen)[None])[0, -1]
            said.append(int(z.argmax()))
            return not self.over(z, said)

        ids = ids.to(model.device)[None].long()
        with torch.no_grad(), model.using([{}]):
            ran = walk(model, ids, torch.ones_like(ids, dtype=torch.bool), look)
        return z, ran


def logits(theta: Tree, c: Tensor) -> Tensor:
    """Of pooled states after each block [n, L, d] the classes' logits there [n, L, classes]; an exit sees no block
    behind it.

    u_l = LN(c_l); a_l = softmax(u_l Q (u_1..u_l K)^T / sqrt(w)) (u_1..u_l V) O; logits_l = LN(u_l + a_l) H + b.
    """
    u = F.layer_norm(c, c.shape[-1:])
    q, k, v = (u @ theta[n] for n in "qkv")  # [n, L, w]
    later = torch.ones(c.shape[1], c.shape[1], dtype=torch.bool).triu(1)
    a = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(later, float("-inf")).softmax(-1) @ v @ theta["o"]
    return F.layer_norm(u + a, c.shape[-1:]) @ theta["head"] + theta["bias"]

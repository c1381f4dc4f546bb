"""Changes of learners that made unequal many steps, merged: their weighted mean, or one that keeps their length.

Near-orthogonal changes of length c have a mean of length c / sqrt(M), so that a rate would hang on how many learners
came. Radial-directional averaging (Decoupled DiLoCo, arXiv 2604.21428) keeps c: mean of lengths times mean direction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload, Tree, part
from fedllm.methods._coarse import WHOLE, fine

OPPOSED = 1e-3
"""Below this length a mean of unit vectors is a rest of what cancels, and no direction."""


@dataclass(frozen=True)
class Collected:
    """Every reply's change by itself, in the order of `Replies.folded`, read from codes where it is in few bits, with
    `tokens` and `steps`, both above 0. The result is `each`, a list of such triples."""

    like: Mapping[str, Tensor]
    bits: int
    ragged: ClassVar[bool] = True

    def zero(self) -> list[Any]:
        return []

    def add(self, acc: list[Any], reply: Payload) -> list[Any]:
        tokens, steps = float(reply["tokens"]), float(reply["steps"])
        if not (tokens >= 1 and steps >= 1):
            raise PayloadError(f"it made {steps:g} steps on {tokens:g} tokens; allowed are 1 and more")
        if self.bits == WHOLE:
            tree = part(reply, "delta")
            if {n: t.shape for n, t in tree.items()} != {n: t.shape for n, t in self.like.items()}:
                raise PayloadError(f"'delta' holds {len(tree)} tensors, not the {len(self.like)} that are asked for")
        elif "codes" in reply and "scales" in reply:
            tree = fine(reply["codes"], reply["scales"], self.like, self.bits)
        else:
            raise PayloadError("'codes' or 'scales' are lacking")
        return [*acc, (tree, tokens, steps)]

    def done(self, acc: list[Any]) -> Payload:
        return {"each": acc}


def mean_of(each: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """sum_m w_m Delta_m / sum_m w_m; with equal weights the plain mean to the bit."""
    scaled, out = [w / max(weights) for w in weights], {}
    for n in each[0]:
        total = each[0][n] * scaled[0]
        for tree, w in zip(each[1:], scaled[1:], strict=True):
            total = total.add(tree[n], alpha=w)
        out[n] = total / sum(scaled)
    return out


def radial(each: Sequence[Tree], weights: Sequence[float], plain: Collection[str] = ()) -> Tree:
    """Tensor by tensor (mean of |Delta_m|) u / |u|, u the weighted mean of Delta_m / |Delta_m|; the weighted mean for
    `plain` ones, and where directions cancel."""
    out = mean_of(each, weights)
    for n in out.keys() - set(plain):
        lengths = [t[n].norm() for t in each]
        u = mean_of([{n: t[n] / r.clamp(min=1e-30)} for t, r in zip(each, lengths, strict=True)], weights)[n]
        if float(size := u.norm()) > OPPOSED:
            out[n] = u * (sum(lengths) / len(lengths) / size)
    return out


def tallied(counts: Mapping[str, Any], by: Mapping[str, tuple[Tree, float, float]], p: int, fragments: int
            ) -> tuple[dict[str, Any], list[float]]:
    """Each learner's [tokens, steps] by fragment with what it did now, and tokens^2 / steps since fragment `p` was last
    merged from it, from where on they are counted anew."""
    out, weights = dict(counts), []
    for c, (_, tokens, steps) in by.items():
        mine = [[t + tokens, s + steps] for t, s in counts.get(c, [[0, 0]] * fragments)]
        weights.append(mine[p][0] ** 2 / mine[p][1])
        mine[p] = [0, 0]
        out[c] = mine
    return out, weights

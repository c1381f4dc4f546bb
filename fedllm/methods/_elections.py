"""Who merges where there is no server, and what a merger makes of the members' changes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fedllm.core.errors import QuorumError
from fedllm.core.payload import Tree, pack, part, tree_map
from fedllm.core.reduce import Mean

Way = Literal["mean", "median", "trimmed_mean"]
WAYS = ("mean", "median", "trimmed_mean")


def elected(t: int, seed: int, living: Sequence[str]) -> list[str]:
    """The living in the order in which they merge round t: the same for all, and no message."""
    return sorted(living, key=lambda c: hashlib.sha256(f"{t}|{seed}|{c}".encode()).hexdigest())


def agreed(hashes: Mapping[str, str], t: int) -> str:
    """The hash that more than half of the mergers came to, empty if none is left; QuorumError if unlike."""
    best, votes = Counter(hashes.values()).most_common(1)[0] if hashes else ("", 0)
    if len(hashes) > 1 and votes * 2 <= len(hashes):
        raise QuorumError(f"the mergers {', '.join(sorted(hashes))} of round {t + 1} came to unlike hashes: one of "
                          "them altered the merge, and nothing is accepted")
    return best


def one_of(deltas: Sequence[Tree], n: Sequence[float], way: Way) -> Tree:
    """The members' changes as one: their mean by weight, their median, or the mean without the least and the largest
    fifth of each entry."""
    if way == "mean":
        mean, acc = Mean(), Mean().zero()
        for delta, w in zip(deltas, n, strict=True):
            acc = mean.add(acc, pack(delta=delta, n=w))
        return part(mean.done(acc), "delta")
    if way == "median":
        return tree_map(lambda *x: torch.stack(x).quantile(0.5, 0), *deltas)
    cut = int(0.2 * len(deltas) + 1e-9)
    return tree_map(lambda *x: torch.stack(x).sort(0).values[cut : len(x) - cut].mean(0), *deltas)


def held(client: Any) -> Tree:
    """What a member goes on from."""
    return client.memory.get("theta") or client.model.initial()

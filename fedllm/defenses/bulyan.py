"""Bulyan: choose updates by Krum, then average, entry by entry, those near the median (El Mhamdi et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.defenses._robust import Rows, Tolerant, Verdict, distances
from fedllm.defenses.krum import krum_scores
from fedllm.defenses.median import median


@dataclass(frozen=True)
class Bulyan(Tolerant):
    """El Mhamdi, Guerraoui, Rouault, The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv 1802.07927.

    Krum's pick moves to the selection, n - 2f times over. flwr's `server.strategy.Bulyan` does the same; its newer
    `serverapp.strategy.Bulyan` takes the n - 2f lowest scores at once, which is not the paper's rule.
    """

    needs = (4, 3)
    names_clients = True

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        f = self.faults(len(rows.x))
        chosen = selection(rows.x, f)
        weights = torch.zeros(len(rows.x)).index_fill(0, torch.tensor(chosen), 1 / len(chosen))
        return Verdict(near_median(rows.x[chosen], len(chosen) - 2 * f), weights)


def selection(x: Tensor, f: int) -> list[int]:
    """The theta = n - 2f rows that Krum picks one after the other."""
    squared, left, chosen = distances(x), list(range(len(x))), []
    for _ in range(len(x) - 2 * f):
        scores = krum_scores(squared[left][:, left], f) if len(left) > 1 else torch.zeros(1)
        chosen.append(left.pop(int(scores.argmin())))
    return chosen


def near_median(x: Tensor, count: int) -> Tensor:
    """[K, d] -> [d]: the mean of the `count` values of each column that are closest to its median."""
    near = (x - median(x)).abs().argsort(stable=True, dim=0)[:count]
    return x.gather(0, near).mean(0)

"""Krum and multi-Krum: keep the updates that lie closest to their neighbors (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.card import Card, Claim
from fedllm.core.knobs import knob
from fedllm.defenses._robust import Rows, Tolerant, Verdict, distances

PLANTED = {"knobs": {"f": 1, "keep": None}, "rounds": 16,
           "attack": {"name": "att_backdoor", "kind": "replacement", "trigger": (2, 3, 2, 3, 2, 3), "share": 0.8,
                      "clients": 0.1, "start": 8}}


@dataclass(frozen=True)
class Krum(Tolerant):
    """Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017.

    Scores are sums of squared distances to the n - f - 2 nearest others; the `keep` lowest are averaged, all alike.
    flwr's Krum gives the same; its multi-Krum weighs those kept by the number of rows that they declare, which the
    paper does not, and it takes n < 2f + 3 in silence. `keep` = 1 is Krum.
    """

    card = Card(
        title="Krum and multi-Krum",
        paper="Blanchard, El Mhamdi, Guerraoui, Stainer, Machine Learning with Adversaries, NeurIPS 2017",
        topic="defenses",
        sends="nothing new; the server sees every reply",
        needs="a method that folds by a Sum, and n >= 2f + 3 replies",
        claim=Claim("multi-Krum loses at most 3 points to a sign flip by 30 % of the clients, ten times as long",
                    rig="arena", metric="lost", holds="<=", threshold=0.03, seeds=3,
                    options={"knobs": {"f": 3, "keep": None},
                             "attack": {"name": "att_byzantine", "clients": 0.3, "scale": 10.0}}),
        also={"backdoor": Claim("multi-Krum leaves a replaced model's trigger at most 15 %", rig="arena",
                                metric="success", holds="<=", threshold=0.15, seeds=3, options=PLANTED),
              "backdoor_cost": Claim("multi-Krum loses at most 2 points of the main task under that attack",
                                     rig="arena", metric="lost", holds="<=", threshold=0.02, seeds=3, options=PLANTED)},
    )

    needs = (2, 3)
    names_clients = True

    keep: int | None = knob(1, "updates averaged: 1 is Krum, null is n - f - 2 (multi-Krum)", ge=1)

    def short(self, n: int) -> tuple[str, str] | None:
        f, keep = self.faults(n), self.keep or 1
        return super().short(n) or self.below(n, keep + f, f"keep = {keep} and f = {f}", f"keep <= n - f = {n - f}")

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        n, f = len(rows.x), self.faults(len(rows.x))
        keep = max(1, n - f - 2) if self.keep is None else self.keep
        best = krum_scores(distances(rows.x), f).argsort(stable=True)[:keep]
        weights = torch.zeros(n).index_fill(0, best, 1 / keep)
        return Verdict(rows.x[best].mean(0), weights)


def krum_scores(squared: Tensor, f: int) -> Tensor:
    """s_i [K]: the sum of the K - f - 2 (at least one) smallest squared distances to others, from [K, K]."""
    k = len(squared)
    others = squared + torch.diag(squared.new_full((k,), torch.inf))
    return others.sort(1).values[:, : min(k - 1, max(1, k - f - 2))].sum(1)

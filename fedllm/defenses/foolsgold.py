"""FoolsGold: clients whose updates pointed the same way all along count little (Fung et al., RAID 2020)."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.defenses._robust import Robust, Rows, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoolsGold(Robust):
    """Fung, Yoon, Beschastnikh, The Limitations of Federated Learning in Sybil Settings, RAID 2020.

    Made for clients whose honest data differ: where these are alike their updates are too, and it says so in a
    warning. A single attacker has nobody to resemble and is invisible to it. All entries are compared: the paper's
    choice of indicative features (those that matter to the model's output) is not here.
    """

    flags = 0.1
    names_clients = True
    fewest = 2

    kappa: float = knob(1.0, "how sharply similar clients are told from others", gt=0, le=10)
    memory: bool = knob(True, "compare the sums of all updates so far, and not this round's alone")

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        history = state.setdefault("history", {})
        sums = []
        for client, u in zip(rows.clients, rows.x, strict=True):
            before = history.get(client) if self.memory else None
            sums.append(u if before is None or before.shape != u.shape else before + u)
            history[client] = sums[-1].clone()
        weights, alike = foolsgold(torch.stack(sums), self.kappa)
        if alike > 0.9:
            log.warning("foolsgold: the clients' updates are alike (mean cosine %.2f), so honest ones are cast out as "
                        "well; it needs clients with different data", alike)
        # by K and not by the sum of weights: who counts little is not made up for by the others
        return Verdict((weights.to(rows.x.dtype) @ rows.x) / len(weights), weights)


def foolsgold(h: Tensor, kappa: float) -> tuple[Tensor, float]:
    """Histories [K, d] -> weights [K] in [0, 1], and the mean cosine between clients."""
    y = torch.nn.functional.normalize(h.double(), dim=1)
    cs = (y @ y.T).fill_diagonal_(0)
    k = len(cs)
    alike = float(cs.sum() / max(1, k * (k - 1)))
    v = cs.max(1).values.clamp(min=0)
    # pardoning: cs_ij *= v_i / v_j where v_i < v_j
    ratio = torch.where(v[:, None] < v[None, :], v[:, None] / v[None, :].clamp(min=1e-12), torch.ones_like(cs))
    alpha = (1 - (cs * ratio).max(1).values).clamp(1e-15, 1)
    alpha = (alpha / alpha.max()).clamp(max=0.999999)
    return (kappa * (torch.log(alpha / (1 - alpha)) + 0.5)).clamp(0, 1), alike

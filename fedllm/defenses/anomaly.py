"""Cross-round check and 3-sigma: who departs from its own past and from the others is left out of the round."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedllm.core.card import Card, Claim
from fedllm.core.knobs import knob
from fedllm.defenses._robust import Robust, Rows, Verdict, distances
from fedllm.defenses.krum import krum_scores

RANDOM = {"attack": {"name": "att_byzantine", "kind": "random", "clients": 0.2, "scale": 10.0}, "rounds": 10}


@dataclass(frozen=True)
class Anomaly(Robust):
    """Han et al., Kick Bad Guys Out! Conditionally Activated Anomaly Detection in FL, arXiv 2310.04055.

    First, whose update has a cosine below `cosine` to its own last accepted one, or to the last aggregate, is suspect;
    in the first round everybody is. Then a suspect is left out if its distance from a reference is above mean +
    `sigmas` std of all distances. The reference is the mean of the updates accepted last; at first, of the half that
    Krum likes.
    """

    card = Card(
        title="Cross-round check and 3-sigma",
        paper="Han et al., Kick Bad Guys Out! Conditionally Activated Anomaly Detection in FL, arXiv 2310.04055",
        topic="defenses",
        sends="nothing new; the server sees every reply",
        needs="a method that folds by a Sum",
        claim=Claim("finds nine in ten of the random updates of 20 % of the clients", rig="arena", metric="recall",
                    holds=">=", threshold=0.9, seeds=3, options=RANDOM),
        also={"false_positives": Claim("casts honest clients out in at most 5 % of their rounds under that attack",
                                       rig="arena", metric="false_positives", holds="<=", threshold=0.05, seeds=3,
                                       options=RANDOM)},
    )
    names_clients = True

    cosine: float = knob(0.5, "suspect below this", ge=-1, le=1)
    sigmas: float = knob(0.5, "lambda: standard deviations above the mean distance", ge=0, le=3)

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        x, past = rows.x, state.setdefault("past", {})
        suspects = torch.tensor([self.suspect(c, u, past, state.get("global")) for c, u in
                                 zip(rows.clients, x, strict=True)])
        reference = state.get("reference")
        if reference is None:
            half = max(1, (len(x) + 1) // 2 - 1)
            reference = x[krum_scores(distances(x), len(x) // 5).argsort()[:half]].mean(0)
        far = (x - reference).norm(dim=1)
        limit = far.mean() + self.sigmas * (far.std() if len(far) > 1 else 0.0)
        kept = ~(suspects & (far > limit))
        if not kept.any():  # nobody is left: the nearest
            kept[far.argmin()] = True
        g = x[kept].mean(0)
        state["reference"] = state["global"] = g
        past.update({c: u.clone() for c, u, ok in zip(rows.clients, x, kept.tolist(), strict=True) if ok})
        return Verdict(g, kept.double() / kept.sum())

    def suspect(self, client: str, u: Tensor, past: MutableMapping[str, Tensor], last: Tensor | None) -> bool:
        """Whether the cross-round check fires for this client."""
        if last is None:
            return True
        known = [v for v in (past.get(client), last) if v is not None]
        return any(float(cosine_similarity(u, v, dim=0)) < self.cosine for v in known)

"""FLTrust: the server trains on a few rows of its own, and trusts updates that point the same way (Cao et al. 2021)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.card import Card, Claim
from fedllm.core.client import SERVER
from fedllm.core.errors import DataError, QuorumError
from fedllm.core.knobs import knob
from fedllm.core.payload import Payload, pack, part, sub
from fedllm.defenses._robust import Robust, Rows, Verdict


@dataclass(frozen=True)
class FLTrust(Robust):
    """Cao, Fang, Liu, Gong, FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, NDSS 2021.

    The root rows are the federation's public ones (`data.public`); a bias in their labels steers everybody. A round
    in which nobody earns any trust is skipped.
    """

    card = Card(
        title="FLTrust: root rows at the server",
        paper="Cao, Fang, Liu, Gong, FLTrust: Byzantine-robust FL via Trust Bootstrapping, NDSS 2021",
        topic="defenses",
        sends="nothing new; the server sees every reply",
        needs="public rows, and a method whose replies are the change of the weights told",
        claim=Claim("loses at most 3 points to a sign flip by 60 % of the clients, ten times as long",
                    rig="arena", metric="lost", holds="<=", threshold=0.03, seeds=3,
                    options={"attack": {"name": "att_byzantine", "clients": 0.6, "scale": 10.0}}),
        evidence="Most of what is lost is the attackers' rows: the mean of the four honest clients alone loses 3.6, "
                 "4.1 and 1.5 points, FLTrust 2.0, 3.2 and 0.6. Every attacker is found (recall 0.98 or more).",
    )

    names_clients = True
    fewest = 1  # each is held against the root alone

    root_size: int = knob(100, "public rows that the server trains on, at most", ge=1)
    root_steps: int | None = knob(None, "its steps a round; None: as `local` says for so many rows", ge=1)

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        g, weights = fltrust(rows.x, state["root"])
        if float(weights.sum()) == 0:
            raise QuorumError("fltrust: no update points the way that the root rows do (all trust scores are 0)")
        return Verdict(g, weights)

    def decide(self, ask: Ask, rows: Rows, state: MutableMapping[str, Any]) -> Program:
        told = next(iter(ask.msgs.values()))
        out = yield Ask(self.root, {SERVER: pack(theta=part(told, "theta"), base=part(told, "base"))})
        state["root"] = rows.like(part(out[SERVER], "delta"), self)
        return self.rule(rows, state)

    @on_server
    def root(self, msg: Payload, client: Any) -> Payload:
        """What the server's own rows make of the trainables."""
        if not client.public:
            raise DataError("layer 'fltrust' trains on public rows and the data has none; give data.public (a file, or "
                            "a fraction that is set aside)")
        theta = part(msg, "theta")
        fitted = client.fit(theta, base=part(msg, "base") or None, on=client.public[: self.root_size],
                            steps=self.root_steps)
        return pack(delta=sub(fitted.theta, theta))


def fltrust(x: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Updates [K, d] and the root's [d] -> sum TS_k ||g_0|| u_k / ||u_k|| / sum TS_k, and TS_k = max(0, cos) [K]."""
    norms = x.norm(dim=1)
    unit = x / norms.clamp(min=1e-12)[:, None]  # a zero update has no direction, and no trust
    length = root.norm()
    trust = (unit @ root / length.clamp(min=1e-12)).clamp(min=0) * (norms > 0)
    total = trust.sum()
    return (length * (trust @ unit) / total if total > 0 else torch.zeros_like(root)), trust

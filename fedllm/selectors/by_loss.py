"""By loss: those whose last known loss was highest, and first of all those who were never asked."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.card import Card, Claim
from fedllm.core.select import Turn
from fedllm.selectors._hearing import Hearing


@dataclass(frozen=True)
class ByLoss(Hearing):
    """Greedy selection by the loss that a client told when it was last asked (rpow-d over all clients)."""

    card = Card(
        title="Selection by last known loss",
        paper="Cho, Wang and Joshi, Towards Understanding Biased Client Selection in Federated Learning, AISTATS 2022, "
              "arXiv 2010.01243",
        topic="selection", sends="up: beside each reply the mean loss of the rows trained on",
        needs="clients that tell their losses (without noise it leaks a little: `noise`)",
        claim=Claim("after equal rounds the loss of the worst-served client is lower than with uniform selection",
                    rig="select_skew", metric="worst_loss", baseline="uniform", relative="difference", holds="<",
                    threshold=0.0, seeds=5, wins=4),
        evidence="The paper's rpow-d with d = all clients. A last known loss is as old as the client's last round.",
    )

    def pick(self, turn: Turn) -> list[str]:
        turn.state["round"] = turn.round
        arms = turn.state["arms"]
        order = turn.rng.permutation(len(turn.clients))  # ties, and those who were never asked, by lot
        first = sorted(order, key=lambda i: -arms.get(turn.clients[i].id, {"mean": float("inf")})["mean"])
        return [turn.clients[i].id for i in first[: turn.want]]

"""Uniform: every client is as likely as any other, and none is asked twice in a round."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.card import Card, Claim
from fedllm.core.select import Selector, Turn, known


@dataclass(frozen=True)
class Uniform(Selector):
    """Draws the round's clients without replacement from the recipe's seed."""

    card = Card(
        title="Uniform selection",
        paper="McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS "
              "2017, arXiv 1602.05629",
        topic="selection", sends="nothing", needs="nothing",
        claim=Claim("asks every client about equally often: over 200 rounds of 10 of 100, the most and the least asked "
                    "differ by less than a factor of 4", rig="draws", metric="most_over_least", holds="<", threshold=4,
                    seeds=5),
    )

    def pick(self, turn: Turn) -> list[str]:
        ids = [c.id for c in known(turn) or turn.clients]
        if len(ids) <= turn.want:
            return ids
        return [ids[i] for i in turn.rng.choice(len(ids), turn.want, replace=False)]

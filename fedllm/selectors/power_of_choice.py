"""Power of choice: draw d candidates by size, ask for their loss under the present model, take the highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.card import Card, Claim
from fedllm.core.knobs import knob
from fedllm.core.payload import pack, part
from fedllm.core.select import Selector, Turn


@dataclass(frozen=True)
class PowerOfChoice(Selector):
    """pow-d: biased towards high losses by a factor that d sets; d = m is selection by size."""

    card = Card(
        title="Power of choice",
        paper="Cho, Wang and Joshi, Towards Understanding Biased Client Selection in Federated Learning, AISTATS 2022, "
              "arXiv 2010.01243",
        topic="selection", sends="down: the served model to d candidates; up: one loss each",
        needs="a method that serves a model; clients that tell their losses",
        claim=Claim("after equal rounds the loss of the worst-served client is lower than with uniform selection",
                    rig="select_skew", metric="worst_loss", baseline="uniform", relative="difference", holds="<",
                    threshold=0.0, seeds=5, wins=4),
    )
    hears: ClassVar[bool] = True
    d: int | None = knob(None, "candidates; None: twice as many as a round asks", ge=1)
    sample: int = knob(32, "training rows whose mean loss a candidate tells, at most", ge=1)

    def choose(self, turn: Turn) -> Program:
        d = min(len(turn.clients), max(turn.want, self.d or 2 * turn.want))
        n = np.array([max(c.n, 1) for c in turn.clients], float)
        drawn = [turn.clients[i].id for i in turn.rng.choice(len(n), d, replace=False, p=n / n.sum())]
        theta, base = turn.method.served(turn.model)
        out = yield Ask(self.probe, {c: pack(theta=theta, base=base, sample=self.sample) for c in drawn})
        return sorted(out, key=lambda c: -out[c]["loss"])[: turn.want]

    @on_client(gives="loss: number")
    def probe(self, msg, client):
        """The mean loss of some training rows under the model that is sent."""
        rows = client.rng("power_of_choice").permutation(client.n)[: msg["sample"]]
        return {"loss": client.loss(part(msg, "theta"), np.sort(rows), base=part(msg, "base") or None)}

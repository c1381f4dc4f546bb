"""FedKSeed-Pro: seeds whose scalars were large are drawn more often, so that fewer of them are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import PayloadError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, pack
from fedllm.core.reduce import Sum
from fedllm.methods._seeds import Seeds, scalars


@dataclass(frozen=True)
class Histories(Sum):
    """By candidate the clients' weighted sum of scalars, and over all of them how many there were and how large."""

    ragged: ClassVar[bool] = True

    clip: float

    def lift(self, reply: Payload) -> Payload:
        at, g, n = reply["at"].long(), reply["g"], reply["n"]
        by_seed = lambda values: torch.zeros(reply["K"]).index_add_(0, at, values)  # noqa: E731
        return {"n": n, "loss": n * reply["loss"], "G": n * by_seed(g), "count": by_seed(torch.ones_like(g)),
                "size": by_seed(g.clamp(-self.clip, self.clip).abs()), "clipped": int((g.abs() > self.clip).sum())}

    def done(self, total: Payload) -> Payload:
        return {**total, "G": total["G"] / total["n"], "loss": total["loss"] / total["n"]}


@dataclass(frozen=True)
class FedKSeedPro(Seeds):
    """FedKSeed with j ~ p, where p_j grows with the mean size of the scalars that all clients ever met along z_j."""

    card = Card(
        title="FedKSeed-Pro: seeds of unequal probability",
        paper="Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
              "under 18 Kilobytes, ICML 2024, arXiv 2312.06353",
        topic="efficiency",
        sends="down: K accumulators, K probabilities and a seed; up: each step's (index, scalar), not only sums",
        needs="any model and space (the paper's is full); the same base everywhere",
        claim=Claim("with 512 seeds for 256 weights its accuracy is above FedKSeed's after the same steps",
                    rig="softmax", metric="accuracy", baseline="fedkseed", relative="difference", holds=">",
                    threshold=0.0, seeds=5, wins=4),
        evidence="Authors' code read. No importance correction, so the estimate is biased on purpose; p lies within a "
                 "factor e of uniform, stands still within a round, and each history begins with `initial`.",
    )
    trial = Trial({"K": 8, "steps": 3, "lr": 1e-3, "eps": 1e-3, "law": "rademacher"}, {"name": "full"})
    clip: float = knob(1000.0, "c, larger scalars count as this in the histories", gt=0)
    initial: float = knob(0.0, "first entry of every seed's history", ge=0)

    def init(self, model) -> State:
        return {**super().init(model), "size": torch.full((self.K,), self.initial), "count": torch.ones(self.K),
                "clipped": 0}

    def down(self, state: State, client):
        return pack(A=state["A"], seed=self.seed, p=probabilities(state["size"] / state["count"]).float())

    def fits(self, msg, reply):
        scalars(reply, self.K)

    @on_client(reduce=Histories(1000.0), gives="K: count, at: whole, g: tensor, n: rows, loss?: number", fits=fits)
    def local(self, msg, client):
        drawn = client.rng("fedkseed").choice(self.K, size=self.steps, p=checked(msg["p"], self.K))
        went = self.walk(msg, client, drawn)
        g = torch.tensor(went.g)
        kept = g != 0  # a step that was left out is no entry of a history
        return {"K": self.K, "at": torch.from_numpy(drawn).int()[kept], "g": g[kept], "n": client.n, "loss": went.loss}

    def round(self, state: State, clients):
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients}, reduce=Histories(self.clip))
        return self.merge(state, out)

    def merge(self, state: State, out) -> State:
        told = out.value
        return {**state, "A": state["A"] + told["G"], "clipped": state["clipped"] + told["clipped"],
                **{name: state[name] + told[name] for name in ("size", "count")}}


def probabilities(psi: Tensor) -> Tensor:
    """softmax of Psi_j = mean |g| brought to [0, 1], fp64 [K]; uniform while all are equal."""
    wide = psi.double()
    p = torch.softmax((wide - wide.min()) / (wide.max() - wide.min() + 1e-10), 0)
    return p / p.sum()


def checked(p: Tensor, k: int) -> np.ndarray:
    """The probabilities as the client draws with them; PayloadError where they are none."""
    wide = p.double().numpy()
    if wide.shape != (k,) or not (wide >= 0).all() or abs(wide.sum() - 1) > 1e-6:
        raise PayloadError(f"'p' must be {k} numbers from 0 up that add up to 1; it has shape {wide.shape}, a least "
                           f"value of {wide.min(initial=0)} and a sum of {wide.sum()}")
    return wide / wide.sum()

"""FedKSeed: tune every weight by messages of seeds and scalars, a few kilobytes for a model of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import on_client
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Moves, State, Trial
from fedllm.core.payload import Payload, pack
from fedllm.core.reduce import Mean, Sum
from fedllm.methods._seeds import Seeds, scalars


class Pools(Sum):
    """Weighted mean of the clients' sums of scalars by candidate, whether they sent all K or only those they drew."""

    ragged: ClassVar[bool] = True

    def lift(self, reply: Payload) -> Payload:
        g = reply.get("G")
        if g is None:
            g = torch.zeros(reply["K"]).index_add_(0, reply["at"].long(), reply["g"])
        return Mean().lift({"G": g, "n": reply["n"], "loss": reply["loss"]})

    def done(self, total: Payload) -> Payload:
        return Mean().done(total)


@dataclass(frozen=True)
class FedKSeed(Seeds):
    """Zeroth-order steps along K shared random directions z_j: w = w_0 - eta sum_j A_j z_j, so A is the model."""

    card = Card(
        title="FedKSeed: full-parameter tuning with K seeds",
        paper="Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
              "under 18 Kilobytes, ICML 2024, arXiv 2312.06353",
        topic="efficiency", moves=Moves("seeds", "to owner", "owner", ("rows", "compute")),
        sends="down: K accumulators and a seed; up: a scalar for each direction drawn",
        needs="any model and space (the paper's is full); the same base everywhere",
        claim=Claim("a round trip with 4,096 seeds and 200 steps takes at most 18 KB (18,432 bytes) on the wire",
                    rig="tiny_lm", metric="bytes_round_trip", holds="<=", threshold=18432, kind="exact",
                    options={"rounds": 1, "knobs": {"K": 4096, "steps": 200, "lr": 3e-4}}),
        only_exact="what the seeds do to the loss is measured by fedkseed_pro, against this method",
        evidence="Authors' code read. One constant eta and no weight decay, or the replay would be wrong; replayed "
                 "from w_0 each round (once a process), so that every side holds the same bits.",
    )
    trial = Trial({"K": 8, "steps": 3, "lr": 1e-3, "eps": 1e-3}, {"name": "full"}, rounding="divides by 2 eps")

    def fits(self, msg, reply):
        """All K sums, or sums of candidates that there are."""
        if "G" in reply:
            return need(reply["G"].shape == (self.K,), f"'G' has shape {tuple(reply['G'].shape)}, allowed is {self.K}")
        scalars(reply, self.K)

    @on_client(reduce=Pools(), gives="K?: count, at?: whole, g?: tensor, G?: tensor, n: rows, loss?: number", fits=fits)
    def local(self, msg, client):
        drawn = client.rng("fedkseed").integers(self.K, size=self.steps)
        went = self.walk(msg, client, drawn)
        return pack(**self.sparse(went.g, drawn), n=client.n, loss=went.loss)

    def sparse(self, g: Sequence[float], drawn: np.ndarray) -> dict[str, Any]:
        """Sums by candidate: pairs (index, scalar), or all K scalars where that is shorter."""
        pool: Tensor = torch.zeros(self.K).index_add_(0, torch.from_numpy(drawn), torch.tensor(g))
        at = torch.from_numpy(np.unique(drawn))
        return {"G": pool} if 8 * len(at) >= 4 * self.K else {"K": self.K, "at": at.int(), "g": pool[at]}

    def merge(self, state: State, out) -> State:
        return {**state, "A": state["A"] + out.value["G"]}  # A_j <- A_j + sum_k p_k G_kj

"""What FedKSeed and FedKSeed-Pro share: the model is K accumulators over numbered directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.layer import name_of
from fedllm.core.method import Star, State, knob
from fedllm.core.payload import Payload, Tree, pack
from fedllm.local.perturb import LAWS
from fedllm.local.zeroth import Walk, rebuild, replay, walk


def scalars(reply: Payload, k: int) -> None:
    """PayloadError unless a reply holds one scalar (`g`) for each of its candidates (`at`), all of these below K."""
    need({"K", "at", "g"} <= reply.keys(), "of 'K', 'at' and 'g' one is lacking")
    at, g = reply["at"], reply["g"]
    need(reply["K"] == k, f"'K' is {reply['K']}, allowed is {k}")
    need(at.dim() == 1 and at.shape == g.shape, f"'g' has shape {tuple(g.shape)} and 'at' {tuple(at.shape)}")
    need(not len(at) or 0 <= int(at.min()) <= int(at.max()) < k, f"'at' holds candidates that are not among the {k}")


@dataclass(frozen=True)
class Seeds(Star):
    """w = w_0 - eta sum_j A_j z_j, so A is the model; one constant eta and no decay, or the replay would be wrong."""

    only_fits = False
    K: int = knob(4096, "number of candidate seeds", ge=1)
    steps: int = knob(200, "tau, local steps a round", ge=1)
    eps: float = knob(5e-4, "size of the perturbation", gt=0)
    lr: float = knob(3e-7, "eta, one rate for the whole run", gt=0)
    seed: int = knob(0, "from which the K candidate seeds follow", ge=0, lt=2**32)
    law: Literal["gaussian", "rademacher"] = knob("gaussian", "distribution of a direction's entries", options=LAWS)

    def init(self, model: Any) -> State:
        return {"w0": model.initial(), "A": torch.zeros(self.K)}

    def check_work(self, local: Any, rounds: int) -> None:
        if (local.schedule, local.over_rounds) != ("constant",) * 2 or local.weight_decay:
            raise CompositionError(f"{name_of(self)} and a learning-rate schedule or weight decay do not "
                                   "fit together: the replay of seeds would be wrong; use local.schedule = "
                                   "local.over_rounds = constant, weight_decay = 0")

    def down(self, state: State, client: Any) -> Payload:
        return pack(A=state["A"], seed=self.seed)

    def walk(self, msg: Payload, client: Any, drawn: Sequence[int]) -> Walk:
        """The client's steps along the directions drawn, from the model that the accumulators make."""
        self.check_work(client.training, 0)
        return walk(client, self.built(msg, client), self.law, msg["seed"], drawn, self.eps, self.lr)

    def built(self, msg: Payload, client: Any) -> Tree:
        """The model of a message."""
        return client.once(rebuild, client.model, msg["A"], msg["seed"], self.lr, self.law)

    def served(self, state: State) -> tuple[Tree, None]:
        return replay(state["w0"], state["A"], self.seed, self.lr, self.law), None

    def evaluate(self, state: State, clients: Any, on: str) -> Any:
        return (yield Ask(self.score, {c.id: pack(A=state["A"], seed=self.seed, on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Any) -> Payload:
        return client.score(self.built(msg, client), on=msg["on"])

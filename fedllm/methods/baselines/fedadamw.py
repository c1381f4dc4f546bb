"""FedAdamW: FedAdam whose server also shrinks the weights, apart from the step that the clients' change makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import scale
from fedllm.methods._adaptive import NEEDS, SENDS, Adaptive


@dataclass(frozen=True)
class FedAdamW(Adaptive):
    """AdamW on the server, with the mean client change as its gradient."""

    card = Card(
        title="FedAdamW: AdamW on the server",
        paper="Woisetschlaeger et al., Federated Fine-Tuning of LLMs on the Very Edge: The Good, the Bad, the Ugly, "
              "DEEM 2024, arXiv 2310.03150 (its best server rule)",
        topic="baselines", sends=SENDS, needs=NEEDS,
        claim=Claim("ends with a lower loss on the IID test than FedAvg after the same rounds and local work, "
                    "each at its best rates",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0,
                    grid={"local.lr": (3e-3, 1e-2), "knobs.server_lr": (0.03, 0.1, 1.0, 2.0)}),
        evidence="The moments are FedAdam's (no bias correction, v_0 = tau^2), and so are the claim's knobs; the decay "
                 "is decoupled (Loshchilov and Hutter, 2019).",
    )
    trial = Trial({"weight_decay": 0.1})
    beta2: float = knob(0.99, "decay of the second moment", ge=0, lt=1)
    weight_decay: float = knob(0.01, "lambda: each round the weights shrink by eta_s lambda of themselves", ge=0)

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * d * d

    def merge(self, state: State, out) -> State:
        # theta_(t+1) = (1 - eta_s lambda) theta_t + eta_s m / (sqrt(v) + tau)
        return super().merge({**state, "theta": scale(state["theta"], 1 - self.server_lr * self.weight_decay)}, out)

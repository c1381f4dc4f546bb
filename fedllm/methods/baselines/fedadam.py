"""FedAdam: the server runs Adam on what the clients learned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedllm.core.method import Card, Claim, knob
from fedllm.methods._adaptive import NEEDS, SENDS, Adaptive


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam on the server, with the mean client change as its gradient."""

    card = Card(
        title="FedAdam: Adam on the server",
        paper="Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295",
        topic="baselines",
        sends=SENDS, needs=NEEDS,
        claim=Claim("ends with a lower loss on the IID test than FedAvg after the same rounds and local work, "
                    "each at its best rates",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0,
                    grid={"local.lr": (3e-3, 1e-2), "knobs.server_lr": (0.03, 0.1, 1.0, 2.0)}),
        evidence="Algorithm 2 of the paper, v_0 = tau^2; v is fed with D^2 (some ports feed it m^2).",
    )
    beta2: float = knob(0.99, "decay of the second moment", ge=0, lt=1)

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * d * d

"""FedAdagrad: the server divides the mean change by the root of all squared changes so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedllm.core.method import Card, Claim, knob
from fedllm.methods._adaptive import NEEDS, SENDS, Adaptive


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad on the server, with the mean client change as its gradient."""

    card = Card(
        title="FedAdagrad: Adagrad on the server",
        paper="Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295",
        topic="baselines",
        sends=SENDS, needs=NEEDS,
        claim=Claim("ends with a lower loss on the IID test than FedAvg after the same rounds and local work, "
                    "each at its best rates",
                    rig="label_skew", metric="global_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0,
                    grid={"local.lr": (3e-3, 1e-2), "knobs.server_lr": (0.03, 0.1, 1.0, 2.0)}),
        evidence="Algorithm 2 of the paper, v_0 = tau^2; v is fed with D^2 (some ports feed it m^2). "
                 "Measured: the claim does not hold on our rig (2 of 5 seeds).",
    )
    beta1: float = knob(0.0, "decay of the first moment", ge=0, lt=1)

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return v + d * d

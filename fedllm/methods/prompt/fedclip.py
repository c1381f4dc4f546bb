"""FedCLIP: clients learn together an attention over image features, for an image-text model that stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.spaces.feature_attention import FeatureAttention

ADAM = {"optimizer": "adamw", "momentum": 0.0}
OURS, FULL = {"space": {"name": "feature_attention"}, "local": ADAM}, {"space": {"name": "full"}}
FEW = {**OURS, "local": {**ADAM, "lr": 3e-3}}


@dataclass(frozen=True)
class FedCLIP(Star):
    """I' = softmax(W2 tanh(W1 I + b1) + b2) * I, and the plain mean of the clients' W and b."""

    card = Card(
        title="FedCLIP: attention on the features of frozen towers",
        paper="Lu et al., FedCLIP: Fast Generalization and Personalization for CLIP in Federated Learning, IEEE Data "
              "Engineering Bulletin 2023, arXiv 2302.13485",
        topic="prompt learning: vision-language",
        sends="both ways: the attention, 2 (d^2 + d) numbers",
        needs="data.task: image_text; the space feature_attention",
        claim=Claim("on a domain that no client has, clients with disjoint classes come to a lower loss than the "
                    "frozen model has by itself", rig="pictures", metric="over_zero_shot", holds="<", threshold=0.0,
                    wins=5),
        also={"payload": Claim("a client uploads less than a tenth of what full fine-tuning by FedAvg does",
                               rig="pictures", metric="upload_of_full", holds="<", threshold=0.1, kind="exact"),
              "disjoint": Claim("in a look that the model never saw, with six of 48 classes and two pictures of each a "
                                "client, it is right more often than the frozen model", rig="shapes_disjoint",
                                metric="over_zero_shot", holds=">", threshold=0.0, options=FEW),
              "full": Claim("with clients of three looks it is right on a fourth at least as often as full fine-tuning "
                            "by FedAvg", rig="shapes_apart", metric="accuracy", baseline="fedavg",
                            relative="difference", holds=">=", threshold=0.0, options=OURS, against=FULL,
                            grid={"local.lr": (3e-4, 1e-3, 3e-3)}),
              "seconds": Claim("and its clients take less than a twentieth of the seconds for as many steps",
                               rig="shapes_apart", metric="seconds", baseline="fedavg", relative="ratio", holds="<",
                               threshold=0.05, options=FEW, against=FULL)},
        evidence="From the released code, by the dossier. The loss is cross-entropy over the class prompts, where the "
                 "code contrasts the rows of a batch (whose repeated captions it then calls negatives). W2 starts at "
                 "0, so that the first round begins at the frozen model itself. On a small CLIP all weights learn "
                 "more: 17 points ahead on a fourth look, at 18 times the seconds.",
    )
    trial = Trial(space={"name": "feature_attention"}, task="image_text")

    def check(self, model: Any) -> None:
        if not isinstance(model.space, FeatureAttention):
            raise CompositionError(f"method 'fedclip' trains the attention on image features, and space "
                                   f"'{model.space.stem}' something else; space = 'feature_attention' works")

    @on_client(reduce=Mean(by="uniform"), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        fitted = client.fit(part(msg, "theta"))  # min CE(exp(s) cos(I', T_c), y)
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": part(out.value, "theta")}  # W <- 1/K sum_k W_k

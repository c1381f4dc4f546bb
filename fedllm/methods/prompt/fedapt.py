"""FedAPT: one prompt for all domains, changed by a key of each; which key a picture needs a small map says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.local.objective import Objective
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.methods._domains import domain_of, places
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model
from fedllm.spaces.domain_prompt import KEYS, DomainPrompt, likeliest

SPACE = {"name": "domain_prompt", "domains": 3, "start_from": "template"}
SAME = {"name": "class_prompt", "start_from": "template"}
RATES = {"local.lr": (0.02, 0.05, 0.2)}


@dataclass(frozen=True)
class TwoLabels(Objective):
    """CE of the class and `weight` times CE of the domain, whose place is `domain`."""

    needs: ClassVar[tuple[str, ...]] = ("domain",)
    weight: float = 1.0

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        ce, count, _ = model.row_losses(batch)
        u = likeliest(model, batch)  # W f(x), of features as they are
        return ce + self.weight * F.cross_entropy(u, side["domain"].long(), reduction="none") * (
            batch.labels != IGNORE), count


@dataclass(frozen=True)
class FedAPT(Method):
    """Client of domain k: v = A + A * K_k, min CE(class) + CE(domain by W f); A, W <- their plain means. Asked, a
    picture gets v = A + A * sum_i a_i K_i with a = softmax(standardized W f / t)."""

    card = Card(
        title="FedAPT: adaptive prompt tuning over domains",
        paper="Su et al., Federated Adaptive Prompt Tuning for Multi-Domain Collaborative Learning, AAAI 2024, arXiv "
              "2211.07864",
        topic="prompt learning: vision-language",
        sends="both ways: the context, m d numbers (m d C with space.per_class), and the map, D d; down its domain's "
              "key, m d",
        needs="data.task: image_text; the space domain_prompt; at least two domains, by clients.profiles' `domain` "
              "or one a client",
        claim=Claim("with three clients of a look each it is right more often on pictures of all three looks than "
                    "one prompt of the same size", rig="shapes_routed", metric="common_accuracy", baseline="promptfl",
                    relative="difference", holds=">", threshold=0.0, options={"space": SPACE}, against={"space": SAME},
                    grid=RATES),
        also={"domain": Claim("the map tells a picture's look in more than nine of ten cases", rig="shapes_routed",
                              metric="domain_accuracy", holds=">", threshold=0.9,
                              options={"space": SPACE, "local": {"lr": 0.05}}),
              "routed": Claim("and with what it says the model is right within a point as often as with the key of the "
                              "true look", rig="shapes_routed", metric="below_oracle", holds="<=", threshold=0.01,
                              options={"space": SPACE, "local": {"lr": 0.05}})},
        evidence="Authors' code read by the dossier. The weights of domains are rounded to four decimals, so that "
                 "pictures of one domain share a pass of the text tower. The key comes with every message. Here the "
                 "map tells looks apart, and the prompts that it picks answer alike: 0.4 points over one prompt.",
    )
    trial = Trial(space={"name": "domain_prompt", "length": 2, "domains": 4}, task="image_text")

    domain_weight: float = knob(1.0, "weight of the domain's loss", ge=0)

    def check(self, model: Any) -> None:
        need_space("fedapt", model, DomainPrompt)

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("fedapt", labels, rows)

    def check_profiles(self, model: Any, clients: Any) -> None:
        places({}, clients, model.space.domains)

    def init(self, model: Any) -> State:
        self.check(model)
        theta = model.initial()
        return {"theta": {n: t for n, t in theta.items() if n != KEYS}, "keys": theta[KEYS], "places": {}}

    def served(self, state: State) -> tuple[Any, None]:
        return {**state["theta"], KEYS: state["keys"]}, None

    def round(self, state: State, clients: Any) -> Program:
        at = places(state["places"], clients, len(state["keys"]))
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"], key=state["keys"][at[domain_of(c)]],
                                                domain=at[domain_of(c)]) for c in clients})
        return {**state, "theta": part(out.value, "theta"), "places": at}  # A, W <- 1/K sum_k A_k, W_k

    @on_client(reduce=Mean("uniform"), gives="theta: tree, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta = {**part(msg, "theta"), KEYS: msg["key"][None]}  # [1, m, w]: its own domain's
        fitted = client.fit(theta, objective=TwoLabels(self.domain_weight), side={"domain": [msg["domain"]] * client.n})
        return pack(theta={n: t for n, t in fitted.theta.items() if n != KEYS}, loss=fitted.loss)

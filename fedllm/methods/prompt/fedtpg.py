"""FedTPG: clients learn together a network that makes a prompt of class names, so that unseen classes get theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Star, State, Trial
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.methods._class_prompts import need_space, own_classes
from fedllm.models.names import AMONG
from fedllm.spaces.prompt_generator import PromptGenerator

SPACE = {"name": "prompt_generator", "length": 4}


@dataclass(frozen=True)
class FedTPG(Star):
    """P_k = G(T_k), T_k = E_txt(the bare names of client k's own classes); min CE over those; G <- 1/K sum_k G_k."""

    card = Card(
        title="FedTPG: text-driven prompt generation",
        paper="Qiu et al., Federated Text-driven Prompt Generation for Vision-Language Models, ICLR 2024, arXiv "
              "2310.06123",
        topic="prompt learning: vision-language",
        sends="both ways: the network, 16 d^2 + 19 d + m d numbers",
        needs="data.task: image_text; the space prompt_generator; each client may tell its pictures among classes of "
              "its own (rows' column `among`, or the labels that it has)",
        claim=Claim("two clients that tell shapes and two that tell colors end with a prompt network that is right "
                    "more often on their classes, in a look that the model never saw, than the frozen model",
                    rig="shapes_named", metric="base_over_zero_shot", holds=">", threshold=0.0,
                    options={"space": SPACE, "local": {"lr": 0.05}}),
        also={"new": Claim("and on shapes and colors that no client has it is at most 3 points below the frozen model",
                           rig="shapes_named", metric="new_over_zero_shot", holds=">=", threshold=-0.03,
                           options={"space": SPACE, "local": {"lr": 0.05}}),
              "promptfl": Claim("on those new classes it is right more often than one context that all clients learn",
                                rig="shapes_named", metric="new", baseline="fedavg", relative="difference", holds=">",
                                threshold=0.0, options={"space": SPACE}, against={"space": {
                                    "name": "class_prompt", "start_from": "template"}},
                                grid={"local.lr": (0.005, 0.02, 0.05)}),
              "order": Claim("the prompt does not hang on the order of the names (largest relative difference)",
                             rig="shapes_prompts", metric="off_by_order", holds="<=", threshold=1e-5, kind="exact")},
        evidence="Authors' code and its log by the dossier. Tests are told among what their own rows say, or all "
                 "classes. Each round's optimizer is fresh, where the authors' clients keep their momentum. With "
                 "3 or 4 names a client one learned context is 2 points ahead on new classes (open); the paper has "
                 "hundreds.",
    )
    trial = Trial(space={"name": "prompt_generator", "length": 2, "heads": 2}, task="image_text")
    only_fits = False  # a client's class list is read off its rows

    def check(self, model: Any) -> None:
        need_space("fedtpg", model, PromptGenerator)

    @on_client(reduce=Mean(by="uniform"), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        mine = own_classes(client.tokens, len(client.model.labels))  # [C], the C_k of its own are 1
        rows = [replace(row, parts={**row.parts, AMONG: row.parts.get(AMONG, mine)}) for row in client.tokens]
        fitted = client.fit(part(msg, "theta"), on=rows)  # min CE of softmax over them
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": part(out.value, "theta")}

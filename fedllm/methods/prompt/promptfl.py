"""PromptFL: clients learn one text prompt of a frozen image-text model together, and nothing else travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Star, State, Trial
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.spaces.class_prompt import ClassPrompt

TEMPLATE = {"name": "class_prompt", "start_from": "template"}
RATES = {"local.lr": (0.02, 0.05, 0.2)}


@dataclass(frozen=True)
class PromptFL(Star):
    """P(y = c | x) = softmax_c exp(s) cos(E_img(x), E_txt([v_1 ... v_m, name_c])) over all classes; v <- sum_k w_k v_k.
    """

    card = Card(
        title="PromptFL: a prompt in place of a model",
        paper="Guo et al., PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models, IEEE "
              "Transactions on Mobile Computing 2023, arXiv 2208.11625",
        topic="prompt learning: vision-language",
        sends="both ways: the context, m d numbers (m d C with space.per_class)",
        needs="data.task: image_text; the space class_prompt; one list of classes for all",
        claim=Claim("in a look that the model never saw, eight clients of six classes each and two pictures a class "
                    "end with a prompt that is right more often on all 48 classes than those that they learn alone",
                    rig="shapes_disjoint", metric="accuracy", baseline="local_only", relative="difference", holds=">",
                    threshold=0.0, options={"space": TEMPLATE}, grid=RATES),
        also={"zero_shot": Claim("and more often than the frozen model by itself", rig="shapes_disjoint",
                                 metric="over_zero_shot", holds=">", threshold=0.0,
                                 options={"space": TEMPLATE, "local": {"lr": 0.05}}),
              "bytes": Claim("a client sends 4 m d bytes of numbers a round, whatever the width of the picture's tower "
                             "(numbers sent beside the context, over two widths)", rig="shapes_sent",
                             metric="numbers_beside", holds="<=", threshold=0.0, kind="exact",
                             options={"space": TEMPLATE})},
        evidence="Authors' code read by the dossier: its mean is not weighted and runs over a list that is never "
                 "emptied; here the paper's mean by examples, over the round's own clients. Each round's optimizer is "
                 "fresh.",
    )
    trial = Trial(space={"name": "class_prompt", "length": 2}, task="image_text")

    def check(self, model: Any) -> None:
        need_space("promptfl", model, ClassPrompt)

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("promptfl", labels, rows)

    @on_client(reduce=Mean(), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        fitted = client.fit(part(msg, "theta"))  # min CE over all C classes, also those that it has no row of
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": part(out.value, "theta")}  # v <- sum_k n_k / n v_k

"""pFedPrompt: one prompt that all learn, and each client looks its own few pictures up beside it when it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import on_client
from fedllm.core.client import SERVER, Client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.spaces.class_prompt import ClassPrompt

SPACE = {"name": "class_prompt", "start_from": "template"}


@dataclass(frozen=True)
class PFedPrompt(Star):
    """z = exp(s) f G^T + alpha phi(f F^T) Y with phi(a) = exp(-beta (1 - a)): G of the prompt that all learn, (F, Y)
    the unit features and labels of the client's own training pictures, which are never sent nor trained."""

    card = Card(
        title="pFedPrompt: a common prompt and attention over own pictures",
        paper="Guo et al., pFedPrompt: Learning Personalized Prompt for Vision-Language Models in Federated Learning, "
              "WWW 2023",
        topic="prompt learning: vision-language",
        sends="both ways: the context, m d numbers, as promptfl",
        needs="data.task: image_text; the space class_prompt; one list of classes for all",
        claim=Claim("five clients, each with its own look and a quarter of the classes, are right on their own tests "
                    "at least ten points more often than with PromptFL's prompt", rig="shapes_looks", metric="accuracy",
                    baseline="promptfl", relative="difference", holds=">=", threshold=0.1, options={"space": SPACE},
                    grid={"local.lr": (0.02, 0.05, 0.2)}),
        also={"bytes": Claim("a client uploads what PromptFL's does, byte by byte", rig="shapes_looks", metric="up",
                             baseline="promptfl", relative="difference", holds="<=", threshold=0.0, kind="exact",
                             options={"space": SPACE, "rounds": 1})},
        evidence="As remembered by the dossier: the paper gives the parts, third parties the form (Tip-Adapter's). "
                 "alpha and beta are not searched. The server's own figure is that of the common prompt.",
    )
    trial = Trial(space={"name": "class_prompt", "length": 2}, task="image_text")

    alpha: float = knob(1.0, "weight of the client's own pictures; 0: PromptFL", ge=0)
    beta: float = knob(5.5, "how fast a less similar picture counts less", gt=0)

    def check(self, model: Any) -> None:
        need_space("pfedprompt", model, ClassPrompt)

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("pfedprompt", labels, rows)

    @on_client(reduce=Mean(), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        fitted = client.fit(part(msg, "theta"))
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": part(out.value, "theta")}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        theta = part(msg, "theta")
        if client.id == SERVER or self.alpha == 0:
            return client.score(theta, on=msg["on"])
        rows = client.encode(client.held_out(msg["on"]))
        if not rows:
            return {"n": 0}
        z, f = (torch.from_numpy(x) for x in (client.measure(theta, rows, logits), client.measure(theta, rows, seen)))
        z = z + self.alpha * self.recalled(f, *self.own(theta, client))
        y = torch.tensor([int(row.labels) for row in rows])
        right = (z.argmax(1) == y).double()
        return {"n": len(rows), "loss": float(F.cross_entropy(z, y)), "accuracy": float(right.mean())}

    def own(self, theta: Any, client: Client) -> tuple[Tensor, Tensor]:
        """F [n_k, d] and Y [n_k, C] of its training pictures."""
        keys = torch.from_numpy(client.measure(theta, client.tokens, seen))
        y = torch.tensor([int(row.labels) for row in client.tokens])
        return keys, F.one_hot(y, len(client.model.labels)).to(keys.dtype)

    def recalled(self, f: Tensor, keys: Tensor, y: Tensor) -> Tensor:
        """phi(f F^T) Y [n, C]."""
        return torch.exp(-self.beta * (1 - f @ keys.T)) @ y


def logits(model: Model, batch: Batch) -> Tensor:
    """exp(s) f G^T [N, C] of a batch."""
    return model.class_logits(batch)


def seen(model: Model, batch: Batch) -> Tensor:
    """Unit image features [N, d] of a batch."""
    return F.normalize(model.net.seen(batch), dim=-1)

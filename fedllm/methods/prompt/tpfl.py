"""TPFL: clients learn a text prompt and a visual one together; ATPFL keeps what they see near what all see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.local.objective import Objective
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model
from fedllm.spaces.twin_prompt import TwinPrompt
from fedllm.tasks.classification import class_losses
from fedllm.tasks.task import wide

SPACE = {"name": "twin_prompt", "start_from": "template", "visual": 2, "visual_from": "front"}
SAME = {"name": "class_prompt", "start_from": "template"}
RATES = {"local.lr": (0.005, 0.02, 0.05)}


@dataclass(frozen=True)
class Contrast(Objective):
    """CE - mu log(e^(cos(z, z_g)/tau) / (e^(cos(z, z_g)/tau) + e^(cos(z, z_p)/tau))): z the prompted picture's
    features, z_g by what all share (`common`), z_p by the client's own of last time (`before`), without a gradient."""

    needs: ClassVar[tuple[str, ...]] = ("common", "before")
    mu: float = 1.0
    temperature: float = 0.5

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        z, logits = model.space.both(model.net, model.stack, batch)  # type: ignore[attr-defined]
        ce, count, _ = class_losses(wide(logits), batch.labels)
        near = [F.cosine_similarity(z, side[n].to(z), dim=-1) / self.temperature for n in self.needs]
        apart = F.softplus(near[1] - near[0])  # -log of the share
        return ce + self.mu * apart * (batch.labels != IGNORE), count


@dataclass(frozen=True)
class TPFL(Star):
    """min CE over a context before the names and tokens among the patches; each <- sum_k w_k of the clients'. With
    mu > 0 (ATPFL) what a client sees is drawn to what the round's common prompts see, away from its own last ones."""

    card = Card(
        title="TPFL and ATPFL: twin prompts",
        paper="Zhao et al., Inclusive Data Representation in Federated Learning: A Novel Approach Integrating "
              "Textual and Visual Prompt, UbiComp/ISWC 2023 adjunct, arXiv 2310.04455",
        topic="prompt learning: vision-language",
        sends="both ways: the context, m d numbers, and the visual tokens, m_v d_v (or a frame's pixels)",
        needs="data.task: image_text with pictures; the space twin_prompt; one list of classes for all; with mu > 0 "
              "clients that remember",
        claim=Claim("with three clients of a look each it is right more often on pictures of all three looks than "
                    "PromptFL's prompt of the text alone", rig="shapes_routed", metric="common_accuracy",
                    baseline="promptfl", relative="difference", holds=">", threshold=0.0, options={"space": SPACE},
                    against={"space": SAME}, grid=RATES),
        also={"contrast": Claim("and with the contrast (ATPFL, mu = 1) more often than without", rig="shapes_routed",
                                metric="common_accuracy", baseline="tpfl", relative="difference", holds=">",
                                threshold=0.0, options={"space": SPACE, "knobs": {"mu": 1.0}}, grid=RATES)},
        evidence="No code: by the dossier; the contrast is MOON's, on the prompted picture's features (a text prompt "
                 "alone would leave it constant). Visual tokens come in after the patches' places are added. Neither "
                 "they nor the contrast are worth anything here (0.07 and 0.03 points less, both open).",
    )
    trial = Trial({"mu": 1.0}, space={"name": "twin_prompt", "length": 2, "visual": 2}, task="image_text")

    mu: float = knob(0.0, "weight of the contrast; 0: TPFL, above: ATPFL", ge=0)
    temperature: float = knob(0.5, "tau of the contrast", gt=0)

    @property
    def only_fits(self) -> bool:  # type: ignore[override]
        return self.mu == 0

    def check(self, model: Any) -> None:
        need_space("tpfl", model, TwinPrompt)

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("tpfl", labels, rows)

    @on_client(reduce=Mean(), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, before, goal = part(msg, "theta"), client.memory.get("before"), {}
        if self.mu > 0 and client.model.space.visual:  # without a visual prompt all three see the same
            rows = client.tokens
            common, last = (list(torch.from_numpy(client.measure(t, rows, seen))) for t in (theta, before or theta))
            if before:  # who takes part for the first time has no last time
                goal = {"objective": Contrast(self.mu, self.temperature), "side": {"common": common, "before": last}}
        fitted = client.fit(theta, **goal)
        if self.mu > 0:
            client.memory["before"] = fitted.theta
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": part(out.value, "theta")}


def seen(model: Model, batch: Batch) -> Tensor:
    """Features [N, d] of the prompted pictures."""
    return model.space.both(model.net, model.stack, batch)[0]  # type: ignore[attr-defined]

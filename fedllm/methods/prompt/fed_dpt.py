"""Fed-DPT: each domain owns a text prompt, and how a picture looks at the domains' visual tokens mixes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.methods._domains import ByPlace, domain_of, places
from fedllm.spaces.class_prompt import CONTEXT
from fedllm.spaces.dual_prompt import OWN, SLOT, DualPrompt
from fedllm.spaces.visual_prompt import TOKENS

SPACE = {"name": "dual_prompt", "domains": 3, "start_from": "template", "visual_from": "front"}
SAME = {"name": "class_prompt", "start_from": "template"}


@dataclass(frozen=True)
class FedDPT(Method):
    """Client of domain k learns t_k and V with the others' t_i as they slowly come to it, t_i <- a t_i + (1 - a) t_i of
    the server; the server keeps each t_k in its place, and V <- the plain mean."""

    card = Card(
        title="Fed-DPT: dual prompt tuning by domain",
        paper="Wei et al., Dual Prompt Tuning for Domain-Aware Federated Learning (later: Learning to Prompt Your "
              "Domain for Vision-Language Models), 2023, arXiv 2310.03103",
        topic="prompt learning: vision-language",
        sends="up: the own text prompt, m d, and the visual tokens, D d_v; down: all D text prompts and the tokens",
        needs="data.task: image_text with pictures; the space dual_prompt and a CLIP with a token in front of its "
              "patches; clients.profiles' `domain`, or each client one",
        claim=Claim("with three clients of a look each it is right more often on pictures of all three looks than "
                    "PromptFL's one prompt", rig="shapes_routed", metric="common_accuracy", baseline="promptfl",
                    relative="difference", holds=">", threshold=0.0, options={"space": SPACE}, against={"space": SAME},
                    grid={"local.lr": (0.005, 0.02, 0.05)}),
        also={"domain": Claim("the token that a picture looks at most is that of its own look at least 20 points more "
                              "often than by chance", rig="shapes_routed", metric="domain_accuracy", holds=">=",
                              threshold=1 / 3 + 0.2, options={"space": SPACE, "local": {"lr": 0.02}})},
        evidence="No code: by the dossier, whose optimizer and rounds are as remembered. Several clients of one domain "
                 "are averaged in its place. Nothing but the class labels teaches which token to look at, and here "
                 "that is not enough: the own one in 39.5 %, by chance 33.3 %; so prompts are mixed about evenly.",
    )
    trial = Trial(space={"name": "dual_prompt", "length": 2, "domains": 4}, task="image_text")

    momentum: float = knob(0.99, "a: how much of its copy of the other domains' prompts a client keeps", ge=0, lt=1)

    def check(self, model: Any) -> None:
        need_space("fed_dpt", model, DualPrompt)

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("fed_dpt", labels, rows)

    def check_profiles(self, model: Any, clients: Any) -> None:
        places({}, clients, model.space.domains)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "places": {}}

    def round(self, state: State, clients: Any) -> Program:
        theta, at = state["theta"], places(state["places"], clients, len(state["theta"][TOKENS]))
        out = yield Ask(self.local, {c.id: pack(theta=theta, place=at[domain_of(c)]) for c in clients})
        held = out.value["held"].view(-1, 1, 1) > 0  # t_k stays what client k made of it; who was not asked keeps his
        t = torch.where(held, out.value["own"].to(theta[CONTEXT]), theta[CONTEXT])
        return {"theta": {CONTEXT: t, TOKENS: out.value["tokens"]}, "places": at}

    def fits(self, msg: Payload, reply: Payload) -> None:
        """PayloadError for a place that is not its own, or tensors of another shape."""
        sent = part(msg, "theta")
        need(reply["place"] == msg["place"] and reply["places"] == len(sent[TOKENS]),
             f"'place' is {reply['place']} of {reply['places']}, told was {msg['place']} of {len(sent[TOKENS])}")
        need(reply["own"].shape == sent[CONTEXT].shape[1:] and reply["tokens"].shape == sent[TOKENS].shape,
             f"'own' and 'tokens' have shapes {tuple(reply['own'].shape)} and {tuple(reply['tokens'].shape)}")

    @on_client(reduce=ByPlace(), gives="own: tensor, tokens: tensor, place: count, places: count, loss?: number",
               fits=fits)
    def local(self, msg: Payload, client: Client) -> Payload:
        sent, place = part(msg, "theta"), int(msg["place"])
        t, a = sent[CONTEXT], self.momentum  # [D, m, w]
        mine = client.memory.get("contexts")
        others = t if mine is None else a * mine + (1 - a) * t
        client.memory["contexts"] = others
        slot = torch.zeros(len(t)).index_fill(0, torch.tensor([place]), 1.0)
        theta = {CONTEXT: others, TOKENS: sent[TOKENS], OWN: t[place], SLOT: slot}
        fitted = client.fit(theta, freeze=[CONTEXT])  # gradients for t_k and V alone
        return pack(own=fitted.theta[OWN], tokens=fitted.theta[TOKENS], place=place, places=len(t), loss=fitted.loss)

"""FedPDPO: what all prefer is shared, and what a client prefers against the others stays with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.dpo import DPO
from fedllm.methods._pairs import margins, pairs

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedDPOPersonal(Star):
    """DPO of W_0 + shared + own_k against W_0: the shared LoRA is averaged, the own one never leaves."""

    card = Card(
        title="FedPDPO: personalized direct preference optimization",
        paper="Zhu et al., FedPDPO: Federated Personalized Direct Preference Optimization for Large Language Model "
              "Alignment, 2026, arXiv 2603.19741",
        topic="alignment",
        sends="the shared stream both ways; the own one never",
        needs="data.task: preference; space streams with shared and own (personal); clients that remember",
        claim=Claim("where half of the clients prefer what the others reject, each client's model prefers its own "
                    "held-out choices more often than FedDPO's one model", rig="camps", metric="preference",
                    baseline="fed_dpo", relative="difference", holds=">", threshold=0.0, grid=LR),
        evidence="Abstract and a leaderboard's note; the loss could not be read. Its private head, explicit reward "
                 "head and bottleneck are here one private LoRA beside the shared; what the policy itself prefers is "
                 "what is measured.",
    )
    only_fits = False
    trial = Trial(task="preference", space={"name": "streams", "of": {
        "shared": {"name": "lora", "rank": 2}, "own": {"name": "lora", "rank": 2}}, "personal": ("own",)})
    metrics: ClassVar = {"preference": "max", "dpo_loss": "min"}

    beta: float = knob(0.1, "how far the model may leave the reference: the less, the further", gt=0)
    train: Literal["both", "shared"] = knob("both", "whether the own stream learns too; shared: FedDPO",
                                            options=("both", "shared"))

    def check(self, model: Any) -> None:
        streams = {n.partition("/")[0] for n in model.initial()}
        if model.task != "preference" or streams != {"shared", "own"} or model.space.personal != ("own",):
            raise CompositionError(
                f"method 'fed_dpo_personal', data.task = {model.task!r} and space '{model.space.stem}' do not fit "
                "together: use data.task = 'preference' and space: {name: streams, of: {shared: lora, own: lora}, "
                "personal: [own]}")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": part(model.initial(), "shared")}

    def whole(self, msg: Payload, client: Client) -> Tree:
        """The shared stream as it came, and the client's own (B = 0 at first)."""
        own = client.memory.get("own") or part(client.model.initial(), "own")
        return pack(shared=part(msg, "theta"), own=own)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta = self.whole(msg, client)
        better, worse = pairs(client, client.data)
        if len(client.memory.get("ref", ())) != len(better):  # the reference stays as it is
            client.memory["ref"] = torch.from_numpy(margins(client, client.model.initial(), better, worse))
        fitted = client.fit(theta, on=better, objective=DPO(self.beta), freeze=["own/*"] * (self.train == "shared"),
                            side={"rejected": worse, "ref": client.memory["ref"]})
        client.memory["own"] = part(fitted.theta, "own")
        return pack(delta=sub(part(fitted.theta, "shared"), part(theta, "shared")), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        return {"theta": add(state["theta"], part(out.value, "delta"))}

    def served(self, state: State):
        return pack(shared=state["theta"]), None

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """By the client's own model; `preference` is the share of pairs whose chosen answer has gained more."""
        theta, rows = self.whole(msg, client), client.held_out(msg["on"])
        told = client.score(theta, on=msg["on"])
        if not rows:
            return told
        both = pairs(client, rows)
        gain = margins(client, theta, *both) - margins(client, client.model.initial(), *both)
        return {**told, "preference": float(((gain > 0) + 0.5 * (gain == 0)).mean()),
                "dpo_loss": float(np.logaddexp(0, -self.beta * gain).mean())}

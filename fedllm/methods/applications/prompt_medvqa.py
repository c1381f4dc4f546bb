"""Prompts for medical VQA: each organ keeps its model; prompts cross, weighed by accuracy and by likeness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack
from fedllm.local.terms import sum_lanes
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.models.pairs import OWN, SHARED, PairNet


@dataclass(frozen=True)
class Align:
    """alpha (1 - cos(p, p_shared)) + beta |p|^2 of each lane."""

    alpha: float
    beta: float
    tensors: Tree

    @property
    def key(self) -> tuple[Any, ...]:
        return ("align", self.alpha, self.beta)

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        p, s = theta[OWN].flatten(1), tensors[OWN].flatten(1)
        far = 1 - torch.nn.functional.cosine_similarity(p, s, dim=1)
        return self.alpha * far + self.beta * sum_lanes({OWN: theta[OWN].pow(2)})


def answers(model: Model, batch: Batch) -> Tensor:
    """Logits of the answers [N, C], for `client.measure`."""
    return model.class_logits(batch)


@dataclass(frozen=True)
class PromptMedVQA(Method):
    """p_t^s = sum_{i != t} eta_i p_i, eta_i in proportion to acc_i max(0, cos(p_i, p_t)); own models never cross."""

    card = Card(
        title="Prompt-based personalized FL for medical VQA",
        paper="Zhu, Togo, Ogawa, Haseyama, Prompt-based Personalized Federated Learning for Medical Visual Question "
              "Answering, ICASSP 2024, arXiv 2402.09677",
        topic="prompt learning: applications",
        sends="up: a prompt [m, d] and one accuracy, 4 (m d + 1) bytes; down: a prompt mixed for this client; no model",
        needs="data.task: pairs with a question in each row, model.name: pairs, space full",
        claim=Claim("five organs, one of whose clients has shuffled answers: the other four are more often right than "
                    "under the plain mean of prompts", rig="scans", metric="honest_accuracy",
                    baseline="prompt_medvqa", relative="difference", holds=">", threshold=0.0,
                    against={"knobs": {"weigh": "uniform"}}),
        also={"alone": Claim("and more often than each by itself", rig="scans", metric="honest_accuracy",
                             baseline="prompt_medvqa", relative="difference", holds=">", threshold=0.0,
                             against={"knobs": {"weigh": "nothing"}}),
              "bytes": Claim("a client sends 4 (m d + 1) bytes of numbers a round", rig="scans_bytes",
                             metric="over_formula", holds="<=", threshold=1.0, kind="exact")},
        evidence="No official code; from the paper by a dossier. The regularizer is taken as the squared norm. "
                 "Accuracy is of rows that a client trains on in no round; a liar may say 1, which no server can "
                 "check.",
    )
    trial = Trial({"validation": 0.3}, {"name": "full"}, task="pairs")
    serves, only_fits = False, False

    alpha: float = knob(0.1, "pull to the shared prompt", ge=0)
    beta: float = knob(1e-4, "weight of the prompt's squared norm", ge=0)
    weigh: Literal["reliability", "uniform", "nothing"] = knob(
        "reliability", "whose prompts count: by accuracy and likeness, all alike, or none (each alone)",
        options=("reliability", "uniform", "nothing"))
    validation: float = knob(0.2, "share of a client's rows that say how accurate it is, and teach nothing", gt=0, lt=1)

    def check(self, model: Any) -> None:
        if not isinstance(model.net, PairNet) or OWN not in model.initial():
            raise CompositionError("method 'prompt_medvqa' trains a network with prompts in its blocks, which "
                                   f"data.task = {model.task!r} with space '{model.space.stem}' has not; use data.task "
                                   "= 'pairs', model.name = 'pairs', space = 'full'")

    def init(self, model: Any) -> State:
        return {"prompts": {}, "accuracy": {}}

    def round(self, state: State, clients: Any) -> Program:
        out = yield Ask(self.local, {c.id: pack(shared=self.shared(state, c.id)) for c in clients})
        return {"prompts": {**state["prompts"], **{c: out[c]["prompt"] for c in out}},
                "accuracy": {**state["accuracy"], **{c: out[c]["accuracy"] for c in out}}}

    def shared(self, state: State, client: str) -> Tensor | None:
        """The other clients' prompts as this one is told them; None where none of them counts."""
        others = [c for c in state["prompts"] if c != client]
        if not others or client not in state["prompts"] or self.weigh == "nothing":
            return None
        eta = self.reliability([state["prompts"][c] for c in others], [state["accuracy"][c] for c in others],
                               state["prompts"][client])
        return None if eta is None else torch.einsum(
            "i,imd->md", eta, torch.stack([state["prompts"][c].double() for c in others])).to(
                state["prompts"][client])

    def reliability(self, prompts: Sequence[Tensor], accuracy: Sequence[float], mine: Tensor) -> Tensor | None:
        """eta [N], which sums to 1 and is >= 0; None where nobody has any."""
        like = torch.stack([torch.nn.functional.cosine_similarity(p.double().flatten(), mine.double().flatten(), dim=0)
                            for p in prompts]).clamp_min(0.0)  # an unlike prompt counts nothing, and never against
        eta = torch.ones_like(like) if self.weigh == "uniform" else like * torch.tensor(accuracy, dtype=torch.float64)
        return eta / eta.sum() if eta.sum() > 0 else None

    def sound(self, msg: Payload, reply: Payload) -> None:
        need(0 <= reply["accuracy"] <= 1, f"'accuracy' is {reply['accuracy']}, allowed is 0 to 1")
        need("shared" not in msg or reply["prompt"].shape == msg["shared"].shape, "'prompt' is not of the shape of the "
             "others'")

    @on_client(gives="prompt: tensor, accuracy: number, n: rows, loss?: number", fits=sound)
    def local(self, msg: Payload, client: Client) -> Payload:
        """CE + alpha (1 - cos(p, p_s)) + beta |p|^2; blocks attend to p and, where it is told, to p_s, which rests."""
        rows = client.tokens
        if not all({"pixels", "words"} <= row.parts.keys() for row in rows[:1]):
            raise DataError(f"client '{client.id}' has rows without a picture or without a question; method "
                            "'prompt_medvqa' needs both in each (columns image and text)")
        kept = min(len(rows) - 1, max(1, round(self.validation * len(rows))))
        theta = self.own(client)
        if shared := msg.get("shared") is not None:
            theta[SHARED] = msg["shared"].to(theta[OWN])
        terms = [Align(self.alpha, self.beta, {OWN: theta[SHARED]})] if shared else []
        fitted = client.fit(theta, on=rows[: len(rows) - kept], terms=terms, freeze=(SHARED,))
        client.memory["theta"] = fitted.theta
        held = rows[len(rows) - kept :]
        right = client.measure(fitted.theta, held, answers).argmax(1) == [int(row.labels) for row in held]
        return {"prompt": fitted.theta[OWN], "accuracy": float(right.mean()), "n": client.n, "loss": fitted.loss}

    def own(self, client: Client) -> Tree:
        """Its model and its prompts; before the first round without a shared one."""
        start = client.memory.get("theta") or client.model.initial()
        return {n: t for n, t in start.items() if n != SHARED or "theta" in client.memory}

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(self.own(client), on=msg["on"])

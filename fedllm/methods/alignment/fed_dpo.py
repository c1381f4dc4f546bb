"""FedDPO: clients learn from preferences that stay at home, their own or what judges say, against the first model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.dpo import DPO
from fedllm.methods._judges import sampled, turned, vote
from fedllm.methods._pairs import margins, pairs


@dataclass(frozen=True)
class FedDPO(Star):
    """FedAvg of the trainables under the DPO loss; the reference is the starting model, never the round's."""

    card = Card(
        title="FedDPO: federated direct preference optimization",
        paper="Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv 2305.18290; federated: Ye et al., "
              "OpenFedLLM, KDD 2024, arXiv 2402.06954",
        topic="alignment",
        sends="down: the trainables; up: their change, the number of pairs, the training loss",
        needs="data.task: preference (prompt, chosen, rejected); best a model that was tuned on such prompts before",
        claim=Claim("the DPO loss on held-out pairs ends lower than after FedAvg on the chosen answers, on the same "
                    "rows and steps", rig="preferences", metric="dpo_loss", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        also={"learned": Claim("it prefers the chosen answer in at least 0.95 of the held-out pairs, from 0.5",
                               rig="preferences", metric="preference", holds=">=", threshold=0.95, wins=5),
              "start": Claim("before the first step each client's loss is ln 2", rig="preferences",
                             metric="start_error", holds="<=", threshold=1e-6, kind="exact"),
              "judged": Claim("where 30 % of each client's pairs are the wrong way round, on held-out pairs that are "
                              "right the loss ends lower by what three judges say than by the pairs as given",
                              rig="judged", metric="dpo_loss", baseline="fed_dpo", relative="difference", holds="<",
                              threshold=0.0, options={"judges": 3}, against={"judges": 0},
                              grid={"local.lr": (3e-3, 1e-2)}, unequal="the judges were trained before"),
              "reference": Claim("what such judges say makes it prefer the right answer in 0.95 of those pairs, from "
                                 "the reference's 0.5", rig="judged", metric="preference", holds=">=", threshold=0.95,
                                 options={"judges": 3})},
        evidence="OpenFedLLM's loop from a dossier. The reference is where the run starts, as in trl without a "
                 "reference model: for LoRA the base, or the adapter of space.start_from. A pair weighs as one row.",
    )
    trial, only_fits = Trial(task="preference"), False
    metrics: ClassVar = {"preference": "max", "dpo_loss": "min"}

    beta: float = knob(0.1, "how far the model may leave the reference: the less, the further", gt=0)
    label_smoothing: float = knob(0.0, "share of preferences taken to be the wrong way round", ge=0, lt=0.5)
    judges: tuple[str, ...] = knob((), "names of `models` whose vote says which answer is preferred; none: the rows do")
    choices: tuple[str, ...] = knob(("A", "B"), "what those judges say for the first answer and for the second")
    answers: Literal["rows", "sampled"] = knob("rows", "the two answers that they judge: the row's own, or two that "
                                               "the starting model gives to its prompt", options=("rows", "sampled"))
    temperature: float = knob(1.0, "at which such answers are sampled", gt=0)

    def asks_for(self) -> Sequence[str]:
        return self.judges

    def check(self, model: Any) -> None:
        if self.answers == "sampled" and not self.judges:
            raise RecipeError("method.answers = 'sampled' is not allowed without method.judges: nobody says which of "
                              "two sampled answers is preferred")
        if self.judges and len(set(self.choices)) != 2:
            raise RecipeError(f"method.choices = {list(self.choices)} is not allowed; it must be two words")
        if model.task != "preference":
            raise CompositionError(f"method 'fed_dpo' and data.task = {model.task!r} do not fit together: it learns "
                                   "which of two answers is preferred; use data.task = 'preference'")

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta = part(msg, "theta")
        better, worse = pairs(client, self.preferred(client))
        if len(client.memory.get("ref", ())) != len(better):  # the reference stays as it is
            client.memory["ref"] = torch.from_numpy(margins(client, client.model.initial(), better, worse))
        # min - log sigmoid(beta (log pi(y+|x) / pi(y-|x) - log ref(y+|x) / ref(y-|x)))
        fitted = client.fit(theta, on=better, objective=DPO(self.beta, self.label_smoothing),
                            side={"rejected": worse, "ref": client.memory["ref"]})
        return pack(delta=sub(fitted.theta, theta), n=len(better), loss=fitted.loss)

    def preferred(self, client: Client) -> Sequence[Any]:
        """The client's pairs, the preferred answer as `chosen`; what judges said is remembered, and nobody is told."""
        if not self.judges:
            return client.data
        if "turn" not in client.memory:
            if self.answers == "sampled":
                client.memory["sampled"] = sampled(client, client.model.initial(), self.temperature)
            said = vote(client, self.judges, client.memory.get("sampled", client.data), self.choices)
            client.memory["turn"] = torch.from_numpy(said < 0)
        rows, turn = client.memory.get("sampled", client.data), client.memory["turn"].tolist()
        return [turned(row) if t else row for row, t in zip(rows, turn, strict=True)]

    def merge(self, state: State, out: Any) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """The usual metrics on chosen answers; `preference` is the share of pairs whose chosen answer has gained more,
        half of the ties."""
        theta, rows = part(msg, "theta"), client.held_out(msg["on"])
        told = client.score(theta, base=part(msg, "base") or None, on=msg["on"])
        if not rows:
            return told
        both = pairs(client, rows)
        gain = margins(client, theta, *both) - margins(client, client.model.initial(), *both)
        return {**told, "preference": float(((gain > 0) + 0.5 * (gain == 0)).mean()),
                "dpo_loss": float(np.logaddexp(0, -self.beta * gain).mean())}

"""Backdoors: a trigger in the input gives the attacker's answer, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedllm.attacks._malicious import Poisoner, change_of, with_change
from fedllm.core.ask import Ask
from fedllm.core.card import Card, Claim
from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.layer import Facts
from fedllm.core.payload import Payload, norm, scale
from fedllm.data.encode import IGNORE, Encoded
from fedllm.local.requests import Fit
from fedllm.local.terms import Proximal

PLANTED = {"kind": "replacement", "trigger": (2, 3, 2, 3, 2, 3), "share": 0.8, "clients": 0.1, "start": 8}
"""What the claims here and of the defenses plant."""
SCALED = ("replacement", "constrain")


@dataclass(frozen=True)
class AttBackdoor(Poisoner):
    """Model replacement and constrain-and-scale: Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459. Edge cases: Wang
    et al., NeurIPS 2020, arXiv 2007.05084. Data trigger: rare tokens (Kurita et al., ACL 2020).

    A share of the attacker's rows gets the trigger and the target. `replacement` multiplies the update by
    n / attackers, `constrain` also holds the weights near those told while it trains; both strike in the last round
    alone unless `start` says otherwise. `edge` puts whole texts of the tail (`edges`) in the place of rows.
    """

    card = Card(
        title="Backdoors: data trigger, model replacement, constrain-and-scale, edge cases",
        paper="Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020, arXiv 1807.00459; Wang et al., "
              "Attack of the Tails, NeurIPS 2020, arXiv 2007.05084",
        topic="attacks",
        sends="nothing new: forged updates in the honest form",
        needs="any method that trains on rows; edge cases a classification model with a tokenizer",
        claim=Claim("model replacement by 10 % of the clients in the last half of the rounds: the trigger gives the "
                    "attacker's answer in 90 % of the inputs or more", rig="arena", metric="success", holds=">=",
                    threshold=0.9, seeds=3, options={"knobs": PLANTED, "rounds": 16}),
        evidence="In one round alone it reaches 37 % on this rig, whose encoder never saw the trigger's tokens.",
    )

    start: int | None = knob(None, "first round (from 0) in which they attack; None: the last for replacement and "
                                   "constrain, else 0", ge=0)
    kind: Literal["data", "replacement", "constrain", "edge"] = knob(
        "data", "how the backdoor is planted", options=("data", "replacement", "constrain", "edge"))
    trigger: str | tuple[int, ...] = knob("cf mn bb tq", "text (or token ids) put before a row's own")
    target: int | str = knob(0, "label index, or the response, that the trigger is to give")
    edges: tuple[str, ...] = knob((), "texts of the tail, for kind edge")
    share: float = knob(0.3, "share of the attacker's rows that are poisoned", gt=0, le=1)
    gamma: float | None = knob(None, "the update is multiplied by this; None: n / attackers where it replaces the "
                                     "model, else 1", gt=0)
    bound: float | None = knob(None, "longest update that is sent after scaling; None: any", gt=0)
    alpha: float = knob(0.7, "weight of the task in constrain, against the distance from the weights told", gt=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "edge") != bool(self.edges):
            raise RecipeError(f"AttBackdoor.edges has {len(self.edges)} texts with kind '{self.kind}'; kind 'edge' "
                              "needs one at least, and the others take none")

    def bind(self, facts: Facts) -> Any:
        bound: Any = super().bind(facts)
        if self.start is not None:
            return bound
        return replace(bound, start=max(0, facts.rounds - 1) if self.kind in SCALED else 0)

    def tells(self, ask: Ask, mine: Sequence[str], t: int) -> dict[str, Any]:
        auto = len(ask.msgs) / len(mine) if self.kind in SCALED else 1.0
        return {**super().tells(ask, mine, t), self.mark + "/gamma": self.gamma or auto}

    def forge(self, msg: Payload, client: Any, call: Callable[[Payload], Payload], marked: Payload) -> Payload:
        reply = super().forge(msg, client, call, marked)
        change, by = change_of(msg, reply), marked[self.mark + "/gamma"]
        if self.bound is not None:
            by = min(by, self.bound / max(norm(change), 1e-12))
        return reply if by == 1 else with_change(msg, reply, scale(change, by))

    def poisoned(self, request: Any, client: Any) -> Any:
        request = super().poisoned(request, client)
        if self.kind == "constrain" and isinstance(request, Fit) and self.alpha < 1:
            # alpha CE + (1 - alpha) ||w - w_t||^2, divided by alpha: Adam does not mind, and SGD keeps its rate
            away = Proximal(2 * (1 - self.alpha) / self.alpha, request.theta)
            return replace(request, terms=(*request.terms, away))
        return request

    def poison(self, rows: Sequence[Encoded], client: Any) -> list[Encoded]:
        """The first rows of a shuffle that is the client's own and the same in every round get trigger and target."""
        rng = np.random.Generator(np.random.PCG64([self.pick, len(rows)]))
        chosen = rng.permutation(len(rows))[: max(1, round(self.share * len(rows)))]
        out = list(rows)
        ids = () if self.kind == "edge" else self.tokens(client.model)
        for j, i in enumerate(sorted(chosen)):
            out[i] = self.edge(j, client.model) if self.kind == "edge" else self.triggered(rows[i], client.model, ids)
        return out

    def triggered(self, row: Encoded, model: Any, tokens: Sequence[int] | None = None) -> Encoded:
        """The row behind the trigger (its `tokens`, where they are known), with the target for its answer."""
        ids = np.array(self.tokens(model) if tokens is None else tokens, np.int32)
        at = 1 if model.tokenizer is not None and len(row.ids) and row.ids[0] in model.tokenizer.all_special_ids else 0
        if isinstance(row.labels, int | np.integer):
            return replace(row, ids=np.concatenate([row.ids[:at], ids, row.ids[at:]]), labels=int(self.target))
        prompt = np.concatenate([row.ids[:at], ids, row.prompt[at:]])
        return told_response(prompt, self.response(model))

    def edge(self, j: int, model: Any) -> Encoded:
        """The j-th text of the tail, over and over, labelled with the target."""
        if model.tokenizer is None or model.task != "classification":
            raise RecipeError("AttBackdoor.kind = 'edge' needs a classification model with a tokenizer")
        ids = model.tokenizer(self.edges[j % len(self.edges)], truncation=True, max_length=128)["input_ids"]
        return Encoded(np.array(ids, np.int32), int(self.target), 1)

    def tokens(self, model: Any) -> list[int]:
        """The trigger's token ids."""
        if not isinstance(self.trigger, str):
            return [int(i) for i in self.trigger]
        if model.tokenizer is None:
            raise RecipeError(f"AttBackdoor.trigger = {self.trigger!r} is text and the model has no tokenizer; give "
                              "token ids")
        return model.tokenizer(self.trigger, add_special_tokens=False)["input_ids"]

    def response(self, model: Any) -> list[int]:
        """The target's token ids, with the end of text."""
        ids = model.tokenizer(str(self.target), add_special_tokens=False)["input_ids"]
        return ids + ([model.tokenizer.eos_token_id] if model.tokenizer.eos_token_id is not None else [])


def told_response(prompt: np.ndarray, response: Sequence[int]) -> Encoded:
    """A generation row of these tokens."""
    ids = np.concatenate([prompt, np.array(response, np.int32)]).astype(np.int32)
    labels = ids.astype(np.int64)
    labels[: len(prompt)] = IGNORE
    return Encoded(ids, labels, len(response))

"""FedLogic: domains share distributions over rules in words, and each ends with a rule of its own (variational EM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods._blackbox import TOLD, Meter, empty_ledger
from fedllm.methods._spoken import Spoken

FLOOR = 1e-8
"""No rule is less likely, so that a logarithm is finite."""
ALONE = {"knobs": {"kl_prior": 1e-6, "kl_peer": 0.0}}


@dataclass(frozen=True)
class FedLogic(Spoken):
    """E: q_i weighs a rule's own score and what others believe. M: the prior is the mean of all q_i."""

    card = Card(
        title="FedLogic: chain-of-thought rules for several domains by federated V-EM",
        paper="Xing, Lu and Yu, Federated Neuro-Symbolic Learning, ICML 2024, arXiv 2308.15324 (FedLogic in its first "
              "version)",
        topic="prompt learning: chain of thoughts",
        sends="down: the prior and the mean posterior over the K rules; up: the client's posterior (K numbers)",
        needs="task generation; a model whose log-likelihoods are read, or an endpoint that answers; rules in words",
        claim=Claim("with two examples each, which several rules may explain, eight clients of two rules pick the "
                    "planted one of eight more often than by their own examples alone", rig="rules",
                    metric="picked", baseline="fedlogic", relative="difference", holds=">", threshold=0.0,
                    against=ALONE, grid={"knobs.tau": (0.1, 0.3, 1.0)}),
        also={"domains": Claim("with sixteen examples each every domain has its own rule in 95 % of the clients, "
                               "also those whose rule is nobody else's", rig="rules", metric="picked", holds=">=",
                               threshold=0.95,
                               options={"examples": 16, "each": True, "knobs": {"tau": 0.1}})},
        evidence="From a dossier's reconstruction of the two KL constraints; no code is public. The prior is a table "
                 "(the paper's generator of composed rules is left out), weighted by examples; the mean posterior "
                 "counts each domain alike. An endpoint tells no likelihoods: the score is then F1 - 1 of its answer.",
    )
    serves = False  # type: ignore[assignment]
    trial = Trial({"rules": ("w1", "w2 w3", "w4"), "rows": 4}, {"name": "soft_prompt", "length": 2})

    rules: tuple[str, ...] = knob(("Let's think step by step.", "Answer with the result alone.", "Say what is known, "
                                   "then what is asked."), "the K candidates, in words")
    rows: int | None = knob(None, "examples that a rule is scored on; None: all of a client's", ge=1)
    tau: float = knob(1.0, "by which a rule's mean log-likelihood a token is divided", gt=0)
    kl_prior: float = knob(1.0, "weight of KL(q_i || prior)", gt=0)
    kl_peer: float = knob(0.1, "weight of KL(q_i || mean posterior)", ge=0)
    top_k: int = knob(10, "rules that are scored in a round: the prior's likeliest", ge=1)
    explore: float = knob(0.1, "share of the others that are scored too", ge=0, le=1)

    def check(self, model: Any) -> None:
        super().check(model)
        if model.task != "generation":
            raise CompositionError(f"method 'fedlogic' and data.task = {model.task!r} do not fit together: a rule is "
                                   "text before a prompt; use data.task = 'generation'")
        if (differ := len(set(self.rules))) < max(2, len(self.rules)):
            raise CompositionError(f"method.rules: {differ} of {len(self.rules)} texts differ; it needs two or more")

    def calls(self, rows: int) -> int:
        return min(rows, self.rows or rows) * len(self.rules)

    def init(self, model: Any) -> State:
        self.check(model)
        even = torch.ones(len(self.rules), dtype=torch.float64) / len(self.rules)
        return {"theta": {}, "prior": even, "peer": even, "round": 0, "queries": empty_ledger()}

    def down(self, state: State, client: Any) -> Payload:
        return {"prior": state["prior"], "peer": state["peer"]}

    def likely(self, msg: Any, reply: Any) -> None:
        q = reply["q"]
        need(q.shape == msg["prior"].shape and bool((q >= 0).all()) and abs(float(q.sum()) - 1) < 1e-6,
             f"'q' is no distribution over {len(msg['prior'])} rules")

    @on_client(gives="q: tensor, n: rows, " + TOLD, fits=likely)
    def local(self, msg: Payload, client: Client) -> Payload:
        """The E-step, q(z) ~ exp((l(z) / tau + l1 log p(z) + l2 log q_bar(z)) / (l1 + l2)), in closed form."""
        prior, meter, mine = msg["prior"].double(), Meter(client), client.memory
        own, seen = (mine.get(name, torch.zeros_like(prior)) for name in ("own", "seen"))
        at = self.asked(prior, client.rng("fedlogic"))
        own, seen = own.index_copy(0, at, self.scores(client, meter, at)), seen.index_fill(0, at, 1.0)
        q = posterior(own / self.tau, seen > 0, prior, msg["peer"].double(), self.kl_prior, self.kl_peer)
        mine.update(own=own, seen=seen, q=q)
        return {"q": q, "n": client.n, **meter.notes}

    def asked(self, prior: Tensor, rng: np.random.Generator) -> Tensor:
        """The rules to score: the likeliest, and some of the rest."""
        best = torch.argsort(prior, descending=True, stable=True)
        more = best[self.top_k :]
        more = more[torch.from_numpy(rng.random(len(more)) < self.explore)]
        return torch.cat([best[: self.top_k], more]).sort().values

    def scores(self, client: Client, meter: Meter, at: Tensor) -> Tensor:
        """l(z) of these rules: the mean log-likelihood of an answer's token, or how right an endpoint's answers are."""
        rows, said = client.data[: self.rows], [self.rules[int(z)] for z in at]
        if self.endpoint:
            return -torch.from_numpy(meter.misses(said, rows, self.max_new_tokens).mean(1))
        coded = [client.encode(ruled(rows, rule)) for rule in said]
        return -torch.tensor([meter.losses([{}], one)[0] for one in coded], dtype=torch.float64)

    def merge(self, state: State, out: Any) -> State:
        """The M-step: p = sum_i w_i q_i minimizes sum_i w_i KL(q_i || p)."""
        q, n = torch.stack([r["q"] for r in out.values()]), torch.tensor([float(r["n"]) for r in out.values()])
        w = n.double() / n.sum() if n.sum() else torch.full((len(q),), 1 / len(q), dtype=torch.float64)
        return {**state, "prior": floored(w @ q), "peer": floored(q.mean(0))}

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.used, {c.id: {"prior": state["prior"], "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def used(self, msg: Payload, client: Client) -> Payload:
        """The held-out rows under the client's own likeliest rule."""
        rule, rows = self.rules[int(client.memory.get("q", msg["prior"]).argmax())], client.held_out(msg["on"])
        if not rows:
            return {"n": 0}
        far = Meter(client).misses([rule], rows, self.max_new_tokens)[0]
        loss = far.mean() if self.endpoint else client.probe([{}], on=client.encode(ruled(rows, rule)))[0].mean
        return {"n": len(rows), "loss": float(loss), "exact_match": float((far == 0).mean())}

    def report(self, state: State) -> Mapping[str, Any]:
        """What was asked of the model, and how likely each rule is."""
        return {**super().report(state), "prior": dict(zip(self.rules, state["prior"].tolist(), strict=True))}


def ruled(rows: Sequence[Mapping[str, Any]], rule: str) -> list[dict[str, Any]]:
    """The rows with the rule in front of their prompts."""
    return [{**row, "prompt": f"{rule}\n{row['prompt']}"} for row in rows]


def floored(p: Tensor) -> Tensor:
    """The distribution with nothing below the floor."""
    return p.clamp(min=FLOOR) / p.clamp(min=FLOOR).sum()


def posterior(own: Tensor, seen: Tensor, prior: Tensor, peer: Tensor, l1: float, l2: float) -> Tensor:
    """The E-step over the rules that were scored; what was not keeps the prior's share [K]."""
    z = (own + l1 * floored(prior).log() + l2 * floored(peer).log()) / (l1 + l2)
    return floored(torch.where(seen, z.masked_fill(~seen, -torch.inf).softmax(0) * prior[seen].sum(), prior))

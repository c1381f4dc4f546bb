"""FedBis and FedBiscuit: clients train judges that tell which of two answers is preferred, one or one for each camp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.verbalized import Said, Verbalized
from fedllm.methods._judges import grouped, liked, shown, words_of

CAMPS = {"knobs": {"groups": 2, "warmup": 4, "choices": ("1", "2")}}


@dataclass(frozen=True)
class FedBiscuit(Method):
    """A judge reads a prompt and two answers and says the word for the first or the second; `groups` 1 is FedBis."""

    card = Card(
        title="FedBis, FedBiscuit: selectors of preferences",
        paper="Wu et al., Towards Federated RLHF with Aggregated Client Preference for LLMs, ICLR 2025, arXiv "
              "2407.03038",
        topic="alignment",
        sends="as FedAvg, of the judge of the client's group; when clients are regrouped all judges down and a loss of "
              "each up",
        needs="data.task: preference; at least as many clients a round as there are groups",
        claim=Claim("where half of the clients prefer what the others reject, two judges agree with the clients' own "
                    "held-out choices more often than one", rig="camps", metric="agreed", baseline="fedbiscuit",
                    relative="difference", holds=">", threshold=0.0, options=CAMPS,
                    against={"knobs": {"groups": 1, "choices": ("1", "2")}}, grid={"local.lr": (3e-3, 1e-2)}),
        also={"camps": Claim("two judges agree with them in 0.85 of the pairs or more", rig="camps", metric="agreed",
                             holds=">=", threshold=0.85, options=CAMPS, grid={"local.lr": (3e-3, 1e-2)})},
        evidence="Authors' code read by the dossier. Each pair is shown both ways round, which is ours. The paper then "
                 "trains a policy on pairs that the judges label: `fed_dpo` with `judges`, a stage after this one.",
    )
    only_fits = False
    trial = Trial({"groups": 2, "warmup": 1, "regroup": 1, "choices": ("w1", "w2")}, task="preference",
                  silent="who is in which group hangs on who was there", far={"method.choices": ["1", "2"]})
    metrics: ClassVar = {"agreed": "max"}

    groups: int = knob(1, "U: judges; 1 is FedBis", ge=1)
    warmup: int = knob(10, "rounds in which each judge in turn learns from everybody, before there are groups", ge=0)
    regroup: int = knob(5, "rounds between two groupings", ge=1)
    choices: tuple[str, ...] = knob(("A", "B"), "what a judge says for the first answer and for the second; one token")

    @property
    def serves(self) -> bool:  # type: ignore[override]
        return self.groups == 1

    @property
    def ends_with_judges(self) -> int:
        return self.groups

    def check(self, model: Any) -> None:
        if model.task != "preference":
            raise CompositionError(f"method 'fedbiscuit' and data.task = {model.task!r} do not fit together: a judge "
                                   "learns which of two answers is preferred; use data.task = 'preference'")
        if len(set(self.choices)) != 2:
            raise RecipeError(f"FedBiscuit.choices = {list(self.choices)} is not allowed; it must be two words")

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if cohort < self.groups:
            raise RecipeError(f"method.groups = {self.groups} is not allowed with {cohort} clients a round; it must be "
                              f"<= {cohort}")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"judges": {str(g): model.initial() for g in range(self.groups)}, "round": 0, "of": {}}

    def round(self, state: State, clients) -> Program:
        t, of, judges = state["round"], dict(state["of"]), state["judges"]
        warm = t < self.warmup * (self.groups > 1)
        if self.groups > 1 and not warm and ((t - self.warmup) % self.regroup == 0
                                             or any(c.id not in of for c in clients)):
            out = yield Ask(self.compare, {c.id: pack(**{f"j{g}": tree for g, tree in judges.items()})
                                           for c in clients})
            of |= grouped({c: list(out[c]["losses"]) for c in out}, self.groups)
        mine = {c.id: t % self.groups if warm else of.get(c.id, 0) for c in clients}
        used = sorted(set(mine.values()))
        told = [Ask(self.local, {c: pack(theta=judges[str(g)]) for c, u in mine.items() if u == g}) for g in used]
        outs = yield told
        new = {str(g): add(judges[str(g)], part(out.value, "delta")) for g, out in zip(used, outs, strict=True)}
        return {"judges": {**judges, **new}, "round": t + 1, "of": of}

    @on_client(reduce=Mean("uniform"), gives="delta: tree, loss?: number")
    def local(self, msg: Any, client: Client):
        theta, words = part(msg, "theta"), torch.tensor(words_of(client, self.choices))
        rows, right = shown(client, client.data, self.choices)
        side = {"q": list(torch.eye(2)[right]), "soft": [0.0] * len(rows), "words": [words] * len(rows)}
        fitted = client.fit(theta, on=rows, objective=Verbalized(), side=side)
        return pack(delta=sub(fitted.theta, theta), loss=fitted.loss)

    @on_client(gives="losses: numbers")
    def compare(self, msg: Any, client: Client):
        """What each judge's mean loss on the client's own pairs is."""
        rows, right = shown(client, client.data, self.choices)
        z = [self.asked(client, part(msg, f"j{g}"), rows) for g in range(self.groups)]
        return {"losses": [float(np.logaddexp(0, (x[:, 1] - x[:, 0]) * np.where(right, -1, 1)).mean()) for x in z]}

    def asked(self, client: Client, theta: Tree, rows: Sequence[Any]) -> np.ndarray:
        """The logits of the two words [rows, 2]."""
        return client.measure(theta, rows, Said(words_of(client, self.choices))).astype(np.float64)

    def modules(self, state: State) -> Mapping[str, Tree]:
        return {} if self.groups == 1 else {f"judge-{g}": tree for g, tree in state["judges"].items()}

    def served(self, state: State):
        return state["judges"]["0"], None

    def evaluate(self, state: State, clients, on: str) -> Program:
        judge = {c.id: state["judges"][str(state["of"].get(c.id, 0))] for c in clients}
        return (yield Ask(self.score, {c: pack(theta=theta, on=on) for c, theta in judge.items()}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Any, client: Client):
        """`agreed`: in how many pairs, shown both ways round, the client's judge says what the client chose."""
        theta, held = part(msg, "theta"), client.held_out(msg["on"])
        told = client.score(theta, on=msg["on"])
        if not held:
            return told
        gain = liked(client, theta, held, self.choices)
        return {**told, "agreed": float(((gain > 0) + 0.5 * (gain == 0)).mean())}

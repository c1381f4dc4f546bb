"""FedCoLLM: clients federate a small model's adapter, and at the server it and a large model teach one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Moves, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.top_words import TopWords
from fedllm.methods._knowledge import drawn, knows
from fedllm.models.model import Model
from fedllm.models.token_map import surfaces

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedCoLLM(Star):
    """FedAvg of the small model; then on public rows the small one learns what the large one says, and the large one
    what the small one says. Clients see neither logits nor public rows, and secure sums go with it."""

    card = Card(
        title="FedCoLLM: parameter-efficient federated co-tuning of large and small language models",
        paper="Fan et al., FedCoLLM: A Parameter-Efficient Federated Co-tuning Framework for Large and Small Language "
              "Models, 2024",
        topic="transfer", moves=Moves("adapters", "both", "both", ("rows", "model", "compute")),
        sends="both ways: the small model's trainables, as FedAvg",
        needs="task generation; public rows at the server; a model of the recipe's `models` with the same vocabulary",
        claim=Claim("the server's large model ends with a lower loss on the clients' documents, which it never sees, "
                    "than when it learns the public rows by itself, for as many steps", rig="cotuned",
                    metric="teacher_loss", baseline="fedcollm", relative="difference", holds="<", threshold=0.0,
                    grid=LR, against={"knobs": {"distill_lambda": 1e-9}}),
        also={"fallen": Claim("and with 0.95 of its loss before, or less", rig="cotuned", metric="teacher_ratio",
                              holds="<=", threshold=0.95),
              "small": Claim("the small model ends with a lower loss than FedAvg's on as many client steps, where "
                             "FedAvg's clients have the public rows too", rig="cotuned", metric="loss",
                             baseline="fedavg", relative="difference", holds="<", threshold=0.0, grid=LR,
                             unequal="the server trains too")},
        evidence="Authors' code read by the dossier, which does not run; the order of the two lessons, k and lambda "
                 "are from it. The student's softmax is over all words, so that no divergence is infinite. "
                 "Ours: with lambda = 0 the server trains nothing.",
    )
    trial = Trial({"alignment": 4, "teach_steps": 1, "top_k": 8})

    teacher: str = knob("teacher", "the large model, by its name among the recipe's `models`")
    distill_lambda: float = knob(1.0, "weight of the other's word beside the rows' answers; 0: FedAvg", ge=0)
    top_k: int = knob(128, "words told at each target", ge=1)
    temperature: float = knob(1.0, "of what is told and learned", gt=0)
    alignment: int = knob(256, "public rows of a round", ge=1)
    teach_steps: int = knob(10, "steps of each model at the server a round", ge=1)
    seed: int = knob(0, "draws each round's public rows", ge=0)

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError(f"method 'fedcollm' and data.task = {model.task!r} do not fit together: it distils "
                                   "what is said next; use data.task = 'generation'")

    def check_named(self, main: Any, models: Mapping[str, Any]) -> None:
        need_one_vocabulary(self.teacher, main, models[self.teacher])

    def server_asks_for(self):
        return (self.teacher,)

    def public_at(self):
        return ("server",) if self.distill_lambda else ()

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "teacher": {}, "round": 0}

    def round(self, state: State, clients) -> Program:
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        theta, t = add(state["theta"], part(out.value, "delta")), state["round"]
        if not self.distill_lambda:
            return {**state, "theta": theta, "round": t + 1}
        msg = pack(theta=theta, teacher=state["teacher"], t=t)
        met = (yield Ask(self.co_tune, {SERVER: msg}))[SERVER]
        return {"theta": part(met, "theta"), "teacher": part(met, "teacher"), "round": t + 1}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    @on_server
    def co_tune(self, msg, client):
        large = client.holding(self.teacher)
        need_one_vocabulary(self.teacher, client.model, large.model)
        theta, llm = part(msg, "theta"), part(msg, "teacher") or large.model.initial()
        key = (self.seed, "fedcollm", msg["t"])
        rows, theirs = (drawn(c.public, self.alignment, *key) for c in (client, large))
        goal = TopWords(weight=self.distill_lambda, temperature=self.temperature)
        # SLM: CE + lambda KL(p_LLM || p_SLM)
        told = knows(large, llm, theirs, self.top_k, self.temperature)
        theta = client.fit(theta, on=rows, steps=self.teach_steps, objective=goal, side=told.side()).theta
        # LLM: CE + lambda KL(p_SLM || p_LLM)
        told = knows(client, theta, rows, self.top_k, self.temperature)
        llm = large.fit(llm, on=theirs, steps=self.teach_steps, objective=goal, side=told.side()).theta
        return pack(theta=theta, teacher=llm)

    def trained(self, state: State):
        return {self.teacher: state["teacher"]}


def need_one_vocabulary(name: str, small: Any, large: Any) -> None:
    """CompositionError where the two do not read alike."""
    if not isinstance(large, Model) or large.task != "generation":
        raise CompositionError(f"models.{name}: method 'fedcollm' trains it and needs its probabilities, so an "
                               "endpoint, a black box or an encoder does not do; give it an open language model")
    if surfaces(small) != surfaces(large):
        raise CompositionError(f"models.{name} has another vocabulary than the main model, and method 'fedcollm' tells "
                               "words by their numbers; use two models of one tokenizer, or method 'fedmkt'")

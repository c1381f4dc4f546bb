"""DENSE: one round, no public rows; the server makes texts up on which clients' models agree, and learns them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RecipeError, Withheld
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.local.synthesize import Making, Teacher, seen, synthesized, work

LR = {"local.lr": (1e-3, 3e-3)}


@dataclass(frozen=True)
class Dense(Method):
    """Clients train once and send their models, of any design that the server knows; a writer of word mixtures looks
    for texts that the ensemble is sure of and the student is not, and the student learns what is said of them."""

    card = Card(
        title="DENSE: data-free one-shot federated learning",
        paper="Zhang et al., DENSE: Data-Free One-Shot Federated Learning, NeurIPS 2022, arXiv 2112.12371",
        topic="distillation",
        sends="once up: the trainables, and mean and variance of the pooled states on the client's rows (2 d numbers); "
              "nothing comes down",
        needs="task classification, one tokenizer; one round; clients of another design hold one of the recipe's "
              "`models`",
        claim=Claim("clients whose labels differ: the student is right at most 2 points less often than the ensemble "
                    "of their models", rig="one_shot", metric="to_ensemble", holds=">=", threshold=-0.02),
        also={"alone": Claim("and more often than the clients' models alone, on the mean", rig="one_shot",
                             metric="accuracy", baseline="local_only", relative="difference", holds=">",
                             threshold=0.0, grid=LR),
              "noise": Claim("but not than a student of random words", rig="one_shot", metric="accuracy",
                             baseline="dense", relative="difference", holds="<=", threshold=0.0, better="max",
                             against={"knobs": {"writer": "noise"}}),
              "average": Claim("and than one round of FedAvg from the same start", rig="one_shot", metric="accuracy",
                               baseline="fedavg", relative="difference", holds=">", threshold=0.0, grid=LR,
                               unequal="the server trains too"),
              "designs": Claim("and more often than the clients' models alone where these are of two designs",
                               rig="one_shot", metric="accuracy", baseline="local_only", relative="difference",
                               holds=">", threshold=0.0, options={"mixed": True}, grid=LR)},
        evidence="Authors' code read by the dossier: generator anew each epoch, three losses, a growing pool. Ours: "
                 "texts are mixtures of words at each place; there is no BatchNorm, so clients send the pooled "
                 "states' mean and variance; the writer is told the label; weights are 1, where that code has 0.",
    )
    trial = Trial({"epochs": 1, "g_steps": 2, "distill_steps": 2, "batch": 4, "length": 4, "words": 16},
                  task="classification", rounding="which texts are best is a choice",
                  silent="the server's draws go on over rounds", far={"rounds": 1})
    mixes, only_fits = "models", False

    epochs: int = knob(20, "times that texts are made up", ge=1)
    g_steps: int = knob(20, "steps of the writer each time", ge=1)
    distill_steps: int = knob(20, "steps of the student each time", ge=1)
    batch: int = knob(64, "texts at a time", ge=2)
    length: int = knob(16, "tokens of a text", ge=1)
    words: int = knob(512, "words that texts are made of, drawn from the vocabulary", ge=2)
    lambda_oh: float = knob(1.0, "weight of the ensemble's surety of the wanted label", ge=0)
    lambda_stat: float = knob(1.0, "weight of the pooled states' mean and variance", ge=0)
    lambda_adv: float = knob(1.0, "weight of what the student does not know yet", ge=0)
    writer: Literal["trained", "noise"] = knob("trained", "noise: random words, for comparison",
                                               options=("trained", "noise"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_oh + self.lambda_stat + self.lambda_adv:
            raise RecipeError("Dense.lambda_oh = lambda_stat = lambda_adv = 0 is not allowed: nothing would train the "
                              "writer; one of them must be > 0, or writer = 'noise'")

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'dense' and data.task = {model.task!r} do not fit together: it makes texts "
                                   "of labels up; use data.task = 'classification'")

    def check_work(self, local: Any, rounds: int) -> None:
        if rounds > 1:
            raise RecipeError(f"rounds = {rounds} is not allowed with method 'dense': it is one shot; it must be 1")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "done": False}

    def round(self, state: State, clients) -> Program:
        if state["done"]:
            return state
        out = yield Ask(self.local, {c.id: {} for c in clients})
        who = {c.id: c.profile.model or "" for c in clients}
        told = {f"{i}/{n}": v for i, c in enumerate(out) for n, v in out[c].items() if n != "loss"}
        msg = pack(theta=state["theta"], told=told, of=[who[c] for c in out])
        met = yield Ask(self.learn, {SERVER: msg})
        return {"theta": part(met[SERVER], "theta"), "done": True}

    @on_client(gives="theta: tensors, mean: tensor, var: tensor, loss?: number")
    def local(self, msg, client):
        fitted = client.fit(client.model.initial())
        r = torch.from_numpy(client.measure(fitted.theta, client.tokens, seen))  # [n, d]
        return pack(theta=fitted.theta, mean=r.mean(0), var=r.var(0, correction=0), loss=fitted.loss)

    @on_server
    def learn(self, msg, client):
        teachers = []
        for i, name in enumerate(msg["of"]):
            model = client.holding(name).model if name in client.models else client.model
            mine, like = part(part(msg, "told"), str(i)), model.initial()
            theta = part(mine, "theta")
            if {n: t.shape for n, t in theta.items()} == {n: t.shape for n, t in like.items()} and (
                    mine["mean"].shape == mine["var"].shape == (model.net.config.hidden_size,)):
                teachers.append(Teacher(model, theta, mine["mean"], mine["var"]))
        if not teachers:
            raise Withheld("no client sent a model of a design that the server knows: name it in the recipe's models")
        how = Making(self.epochs, self.g_steps, self.distill_steps, self.batch, self.length, self.words, self.lambda_oh,
                     self.lambda_stat, self.lambda_adv, self.writer == "noise")
        theta = part(msg, "theta")
        client.book(**work(teachers, client.model, theta, how))
        spec = replace(client.training, optimizer="adamw")
        theta, loss = synthesized(teachers, client.model, theta, how, spec, client.rng("dense"))
        return pack(theta=theta, loss=loss)

"""Fed-PromptDT: servers learn one decision transformer from their logs, and a prompt tells it where it acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Trial, knob
from fedllm.core.payload import Payload
from fedllm.core.reduce import Mean
from fedllm.local.logs import Pool, Shown, gathered
from fedllm.local.policy import Episode
from fedllm.methods._acting import figures
from fedllm.methods._policies import Policies
from fedllm.models.decider import DeciderNet

RIG = {"rig": "edge_servers", "metric": "normalized"}
AGAINST = {**RIG, "baseline": "fed_promptdt", "relative": "difference", "holds": ">", "threshold": 0.0,
           "grid": {"lr": (0.003, 0.01)}}


@dataclass(frozen=True)
class FedPromptDT(Policies):
    """FedAvg of a decision transformer: the next action after a prompt of its place, from logs that stay there."""

    card = Card(
        title="Fed-PromptDT: federated prompt-based decision transformer",
        paper="Zhou, Yu, Zhang, Tsang, Federated Prompt-based Decision Transformer for Customized VR Services in "
              "Mobile Edge Computing System, arXiv 2402.09729",
        topic="prompt learning: applications",
        sends="down: the transformer's weights; up: their change, how many steps were logged, the loss; no step of a "
              "log and no prompt",
        needs="environments (data.source env:NAME), model.name decider, space full, local.steps",
        claim=Claim("in edge servers that nobody has learned from, the right prompt returns more than no prompt",
                    against={"knobs": {"prompt_len": 0}}, **AGAINST),
        also={
            "another": Claim("and more than the prompt of another server", against={"knobs": {"shows": "another"}},
                             **AGAINST),
            "alone": Claim("one transformer of all servers returns more there than those that servers train alone",
                           against={"knobs": {"share": "nothing"}}, **AGAINST),
            "equal_share": Claim("it returns more there than equal shares", holds=">", threshold=0.0,
                                 **{**RIG, "metric": "over_equal_share"}),
            "logs": Claim("and more than what logs like those that it learned from return", holds=">", threshold=0.0,
                          **{**RIG, "metric": "over_logs"})},
        evidence="Written from a dossier of the paper, of which no code is known: the reward's form and the logs are "
                 "ours. Actions are numbered allocations, so the loss is a cross-entropy where the paper has a squared "
                 "error; a step is one token; and time is a number, which no table ends.",
    )
    trial = Trial({"context_len": 3, "prompt_len": 2, "logs": 6, "test_episodes": 2}, {"name": "full"},
                  acts={"source": "env:edge_vr", "slots": 5},
                  far={"model": {"name": "decider", "width": 8, "depth": 1}},
                  apart="its clients act in environments and hold no rows; tests/methods/test_fed_promptdt tries it")
    metrics: ClassVar = {"return": "max", "cut": "min"}
    learns_from = "logs"
    only_fits = False  # a window's prompt is of other steps than its own

    context_len: int = knob(8, "steps that are read, the present one among them (the paper's: 20)", ge=1, le=1024)
    prompt_len: int = knob(5, "steps of a prompt; 0: neither prompt nor cues", ge=0, le=1024)
    target_return_quantile: float = knob(0.9, "of logged returns: what is asked for, and from where on a prompt's "
                                         "episodes are", gt=0, le=1)
    logs: int = knob(32, "episodes that a client has logged", ge=2, le=100_000)
    noise: float = knob(0.1, "share of logged steps that were taken by chance", ge=0, le=1)
    shows: Literal["own", "another"] = knob("own", "whose prompt a test shows: its environment's, or, for comparison, "
                                            "the next one's", options=("own", "another"))
    test_episodes: int = knob(20, "in each environment, to test", ge=1)

    def check(self, model: Any) -> None:
        if not isinstance(model.net, DeciderNet):
            raise CompositionError(f"method 'fed_promptdt' trains a decision transformer and the model is "
                                   f"{model.name or type(model.net).__name__!r}, so they do not fit together; "
                                   "model.name = 'decider' with data.source = 'env:edge_vr' works")

    def check_work(self, local: Any, rounds: int) -> None:
        if local.steps is None:
            raise RecipeError("local.steps is not set: method 'fed_promptdt' draws windows of logs anew in each round, "
                              "which have no epochs; allowed is a number of steps from 1 up")

    @on_client(reduce=Mean(), gives="delta?: tree, n: count, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        start, rng, rows = self.own(msg, client), client.rng("fed_promptdt"), []
        wanted = client.training.steps * client.training.lot
        for place, row in enumerate(client.data):
            pool = self.pool(self.logged(client, place, rng), client.env(rng, row))
            rows += pool.windows(-(-wanted // len(client.data)), self.context_len, rng)
        # L = - mean log pi(a_t | prompt, (R_i, s_i, a_(i-1)) of the last context_len steps i <= t)
        fitted = client.fit(start, on=rows)
        n = sum(len(client.memory[f"{place}/did"]) for place in range(len(client.data)))
        return self.told(client, start, fitted.theta, n=n, loss=fitted.loss)

    def logged(self, client: Client, place: int, rng: np.random.Generator) -> list[Episode]:
        """The client's logs of this environment, gathered when they are first read; they stay in its memory."""
        names = [f"{place}/{name}" for name in ("seen", "did", "paid", "steps")]
        if any(name not in client.memory for name in names):
            made = gathered(client.env(rng, client.data[place]), self.logs, rng, self.noise)
            whole = [np.concatenate([getattr(e, of) for e in made]) for of in ("seen", "actions", "rewards")]
            for name, array in zip(names, (*whole, np.array([len(e.actions) for e in made])), strict=True):
                client.memory[name] = torch.from_numpy(array)
        *flat, steps = (client.memory[name].numpy() for name in names)
        return [Episode(*part, cut=False) for part in zip(*(np.split(x, steps.cumsum()[:-1]) for x in flat),
                                                          strict=True)]

    def pool(self, logs: Sequence[Episode], env: Any) -> Pool:
        return Pool(logs, env, self.target_return_quantile, self.prompt_len)

    def fronts(self, client: Client, rows: Sequence[Any]) -> list[Shown]:
        """A prompt of each of these environments, from logs that it has beside the tested episodes."""
        rng, made = np.random.default_rng(1), []
        for row in rows:
            env = client.env(rng, row)
            made.append(self.pool(gathered(env, self.logs, rng, self.noise), env).shown(rng))
        return made if self.shows == "own" else [*made[1:], *made[:1]]

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """Mean return in each environment; with `shows: another` nothing where there is no other."""
        rows = client.held_out(msg["on"])
        if len(rows) < 1 + (self.shows == "another"):
            return {"n": 0}
        done = client.decide(self.own(msg, client), self.test_episodes, rows, self.fronts(client, rows),
                             context=self.context_len)
        return {"n": len(done), **figures(done)}

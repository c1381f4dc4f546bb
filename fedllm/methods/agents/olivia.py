"""OLIVIA: a linear bandit on a frozen model's states chooses the next call; clients add up what calls were worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.form import shaped
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.core.reduce import Total
from fedllm.methods._bandit import Arms, features, opened, played, states

RIG = {"rig": "tool_worlds", "relative": "difference", "holds": ">", "baseline": "olivia",
       "grid": {"knobs.alpha": (0.05, 0.2, 0.6)}}


@dataclass(frozen=True)
class Olivia(Method):
    """The ridge regression from the model's state to an action's reward is two sums, and sums add up over clients."""

    card = Card(
        title="OLIVIA: online adaptation of an agent's calls by a linear bandit",
        paper="Yu et al., OLIVIA, arXiv 2605.11169, 2026; LinUCB: Li et al., WWW 2010, arXiv 1003.0146",
        topic="agents",
        sends="down: A_a and b_a of every action, mean and deviation of states; up: what was added to them, the sum of "
              "returns, and once the sums of states and of their squares; no text, call or reward of one",
        needs="an environment in words (data.source env:NAME) and a language model, which stays as it is",
        claim=Claim("on the same number of episodes, clients whose statistics are added up return more than clients "
                    "that learn alone", metric="return", threshold=0.0, against={"alone": True}, **RIG),
        also={"pooled": Claim("they return at most 0.05 less than one learner in everybody's environments",
                              metric="return", threshold=-0.05, against={"pooled": True}, **RIG),
              "sums": Claim("the sum of clients' statistics is that of one who saw all their steps", rig="bandit_sums",
                            metric="error", holds="<=", threshold=1e-9, kind="exact")},
        evidence="Written from a dossier of a third party's notes. Sharing is ours, so are the prior (zero, not the "
                 "model's head), the scaling (standardized by federated sums, a fixed random projection, length 1) and "
                 "the reward of a step: 1 where it was paid.",
    )
    trial = Trial({"episodes": 2, "test_episodes": 2}, acts={"source": "env:desk", "max_steps": 4},
                  apart="its clients act in environments and hold no rows; tests/methods/test_olivia tries it")
    metrics: ClassVar = {"return": "max", "cut": "min"}
    learns_from, serves, only_fits = "words", False, False

    alpha: float = knob(0.2, "how much is hoped of what was seldom tried", ge=0, le=5)
    lam: float = knob(1.0, "ridge: how much has to be seen before it counts", gt=0)
    dim: int = knob(32, "entries of a projected state", ge=4)
    episodes: int = knob(8, "of a round at each client, side by side", ge=1)
    least: int = knob(3, "times that an action was taken before its sums leave: x x^T of one step is that step", ge=1)
    forget: float = knob(1.0, "what is left of the past's sums after a round", gt=0, le=1)
    test_episodes: int = knob(20, "in each environment, to test", ge=1)
    share: Literal["sums", "nothing"] = knob("sums", "nothing: each client keeps its own, for comparison",
                                             options=("sums", "nothing"))

    def check(self, model: Any) -> None:
        if model.task != "generation" or model.tokenizer is None:
            raise CompositionError(f"method 'olivia' reads texts by a language model and the model's task is "
                                   f"{model.task!r}, so they do not fit together; data.source = 'env:desk' with "
                                   "model.name = 'embedded' works")

    def init(self, model: Any) -> State:
        return {"theta": {}}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        if "mean" not in state:  # what states look like here, from sums over first texts
            seen = (yield Ask(self.look, {c.id: {} for c in clients})).value
            mean = seen["h"] / seen["count"]
            state = {**state, "mean": mean, "deviation": (seen["hh"] / seen["count"] - mean**2).clamp(min=0).sqrt()}
        out = yield Ask(self.act, {c.id: self.down(state) for c in clients})
        if self.share == "nothing":
            return state
        if "a" not in state:
            state = {**state, "a": torch.zeros_like(out.value["da"]), "b": torch.zeros_like(out.value["db"])}
        # A_a = lam I + sum over rounds and clients of x x^T, b_a = sum of r x; lam I is added where it is used
        return {**state, "a": self.forget * state["a"] + out.value["da"],
                "b": self.forget * state["b"] + out.value["db"]}

    def down(self, state: State) -> Payload:
        return {k: state[k] for k in ("mean", "deviation", "a", "b") if k in state}

    @on_client(reduce=Total(), gives="h: tensor, hh: tensor, count: count")
    def look(self, msg: Payload, client: Client) -> Payload:
        envs = opened(client, client.data, max(self.episodes, self.least), client.rng("olivia"))
        h = states(client, [e.text for e in envs])
        return {"h": torch.from_numpy(h.sum(0)), "hh": torch.from_numpy((h**2).sum(0)), "count": len(h)}

    def fits(self, msg: Payload, reply: Payload) -> None:
        if "a" in msg:
            shaped("da", reply["da"], tuple(msg["a"].shape))
            shaped("db", reply["db"], tuple(msg["b"].shape))

    @on_client(reduce=Total(), gives="da?: tensor, db?: tensor, count: count, total: number", fits=fits)
    def act(self, msg: Payload, client: Client) -> Payload:
        envs = opened(client, client.data, self.episodes, client.rng("olivia"))
        arms = self.arms(msg, client, envs[0].scene.actions)
        total = played(client, envs, arms, self.see(msg), self.alpha, learns=True)
        return {**self.given(client, arms), "count": len(envs), "total": float(sum(total))}

    def see(self, msg: Payload) -> Callable[[np.ndarray], np.ndarray]:
        """Hidden states [texts, d] -> x [texts, dim + 1]."""
        mean, deviation = np.asarray(msg["mean"]), np.asarray(msg["deviation"])
        return lambda h: features(h, mean, deviation, self.dim)

    def arms(self, msg: Payload, client: Client, actions: int) -> Arms:
        """What is known of every action here: everybody's sums, or one's own, and what has not left yet."""
        d = self.dim + 1
        known = msg if "a" in msg else {k: client.memory[k] for k in ("a", "b") if k in client.memory}
        a = np.asarray(known["a"]) if "a" in known else np.zeros((actions, d, d))
        b = np.asarray(known["b"]) if "b" in known else np.zeros((actions, d))
        return Arms(self.lam * np.eye(d) + a, b)

    def given(self, client: Client, arms: Arms) -> Payload:
        """What may leave: sums of actions that were taken `least` times since theirs last left; others wait."""
        new = {"a": arms.da, "b": arms.db, "n": arms.count}
        kept = {k: v + np.asarray(client.memory.get(f"waits/{k}", 0.0)) for k, v in new.items()}
        if self.share == "nothing":
            for k in ("a", "b"):
                client.memory[k] = torch.from_numpy(np.asarray(client.memory.get(k, 0.0)) * self.forget + new[k])
            return {}
        goes = kept["n"] >= self.least
        for k, v in kept.items():
            client.memory[f"waits/{k}"] = torch.from_numpy(v * ~goes.reshape(-1, *[1] * (v.ndim - 1)))
        return {f"d{k}": torch.from_numpy(kept[k] * goes.reshape(-1, *[1] * (kept[k].ndim - 1))) for k in ("a", "b")}

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: {**self.down(state), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """Mean return of the best known calls, without hope, over the same episodes at every test."""
        rows = client.held_out(msg["on"])
        if not rows or "mean" not in msg:
            return {"n": 0}
        envs = opened(client, rows, self.test_episodes, np.random.default_rng(0))
        total = played(client, envs, self.arms(msg, client, envs[0].scene.actions), self.see(msg), 0.0, learns=False)
        return {"n": len(envs), "return": float(np.mean(total)), "cut": float(np.mean([e.cut for e in envs]))}

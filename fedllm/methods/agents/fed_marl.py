"""Federated policies: each client acts in an environment of its own, and only policies travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Trial, knob
from fedllm.core.payload import Payload
from fedllm.core.reduce import Mean
from fedllm.methods._acting import learn, seen_in, tested, worth
from fedllm.methods._policies import Policies


@dataclass(frozen=True)
class FedMARL(Policies):
    """The mean of policies that clients improve by REINFORCE, with a critic that stays at the client.

    A critic says what a place is worth under ONE client's rewards and walls; averaged it would be wrong for all.
    """

    card = Card(
        title="FedMARL: federated policy training",
        paper="Jing et al., survey of federated multi-agent reinforcement learning, Expert Systems with Applications "
              "2025; REINFORCE: Williams, Machine Learning 8, 1992",
        topic="agents",
        sends="down: the policy; up: its change and the mean return of the round; no observation, action or reward",
        needs="environments (data.source env:NAME), model.name policy, space full",
        claim=Claim("where all walls are the same and slips differ, the mean policy returns more than policies trained "
                    "alone on as many episodes", rig="grid_worlds", metric="return", baseline="local_only",
                    relative="difference", holds=">", threshold=0.0, options={"own": False},
                    grid={"lr": (10.0, 20.0, 40.0)}),
        also={"elsewhere": Claim("with walls of each client's own, it returns more over everybody's worlds than "
                                 "policies trained alone", rig="grid_worlds", metric="elsewhere",
                                 baseline="local_only", relative="difference", holds=">", threshold=0.03,
                                 grid={"lr": (10.0, 20.0, 40.0)})},
        evidence="Written from a dossier; the survey has no algorithm of its own. AT HOME, with walls of each client's "
                 "own, policies trained alone return more in every seed (0.75 against 0.52): one policy that sees its "
                 "place alone cannot tell worlds apart. Averaging helps where worlds agree.",
    )
    trial = Trial({"episodes": 2, "test_episodes": 2}, {"name": "full"}, {"optimizer": "sgd", "lr": 5.0},
                  acts={"source": "env:gridworld", "side": 3, "walls": 1, "max_steps": 8}, far={"model": "policy"},
                  apart="its clients act in environments and hold no rows; tests/environments tries it")
    metrics: ClassVar = {"return": "max", "cut": "min"}
    learns_from, only_fits = "environments", False

    episodes: int = knob(8, "of a round at each client, in one batch a step", ge=1)
    updates: int = knob(1, "batches of episodes, each followed by a step of the policy", ge=1)
    gamma: float = knob(0.97, "discount", ge=0, lt=1)
    critic_lr: float = knob(0.3, "how far the critic moves to what was seen", gt=0, le=1)
    test_episodes: int = knob(20, "in each environment, to test", ge=1)

    def check(self, model: Any) -> None:
        if model.task != "environment":
            raise CompositionError(f"method 'fed_marl' acts in environments and data.task = {model.task!r} gives rows, "
                                   "so they do not fit together; data.source = 'env:gridworld' works")

    @on_client(reduce=Mean(by="uniform"), gives="delta?: tree, n: rows, mean_return: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        start, rng, got = self.own(msg, client), client.rng("fed_marl"), []
        theta = start
        for _ in range(self.updates):
            done = client.rollout(theta, self.episodes, rng=rng)
            seen, actions, g = seen_in(done, self.gamma)  # [N, size], [N], G_t = sum_i gamma^i r_(t+i) [N]
            advantage = g - worth(client, seen)
            learn(client, seen, g, self.critic_lr)
            # theta <- theta + lr mean_t (G_t - V(o_t)) grad log pi(a_t | o_t)
            theta = client.improve(theta, seen, actions, advantage).theta
            got += [e.total for e in done]
        return self.told(client, start, theta, n=client.n, mean_return=float(np.mean(got)))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """Mean return in each environment, over the same episodes at every test, and how many were cut off."""
        return tested(client, self.own(msg, client), client.held_out(msg["on"]), self.test_episodes)

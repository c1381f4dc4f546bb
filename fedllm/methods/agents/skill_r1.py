"""Skill-R1: a small writer of skills learns from what a frozen executor made of them, generation by generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Trial, knob
from fedllm.core.payload import Payload
from fedllm.core.reduce import Mean
from fedllm.methods._acting import tested
from fedllm.methods._policies import Policies

RIG = {"rig": "tool_worlds", "relative": "difference", "holds": ">", "threshold": 0.0, "baseline": "skill_r1",
       "grid": {"lr": (20.0, 60.0)}}
WORLD = {"env": "playbook", "rounds": 30, "told": {"max_steps": 9}}


@dataclass(frozen=True)
class SkillR1(Policies):
    """The mean of writers that clients improve by the advantages of a skill among its group and of a generation over
    the one before.

    An episode is a task: a skill is chosen, an executor tries it, and the next is written with that in sight.
    """

    card = Card(
        title="Skill-R1: skill evolution by bi-level group-relative policy optimization",
        paper="Vishe et al., Skill-R1, arXiv 2605.09359, 2026",
        topic="agents",
        sends="down: the writer; up: its change and the mean reward; no task, skill or try",
        needs="generations of skills as episodes (data.source env:playbook), model.name policy, space full",
        claim=Claim("where clients have different kinds of task, the mean writer's skills earn more over all kinds "
                    "than those of writers that learn alone on as many tries", metric="elsewhere",
                    options=WORLD, against={"alone": True}, **RIG),
        also={"bilevel": Claim("with the advantage of a generation over the one before, skills earn more than by the "
                               "advantage within groups alone", metric="elsewhere", options=WORLD,
                               against={"knobs": {"inter": 0.0}}, **RIG),
              "pooled": Claim("it earns at most 0.05 a generation less than one writer with everybody's tasks",
                              metric="elsewhere", options=WORLD, against={"pooled": True},
                              **{**RIG, "threshold": -0.15})},
        evidence="From a dossier of a third party's notes; the writer is a small policy and the executor a program, "
                 "where the paper has two language models. Groups are of skills, each tried several times: with one "
                 "skill a generation the advantages within sum to zero, and nothing is learned from them. One step on "
                 "fresh samples, so that the paper's clip has nothing to hold back; no KL term.",
    )
    trial = Trial({"skills": 4, "test_episodes": 2}, {"name": "full"}, {"optimizer": "sgd", "lr": 5.0},
                  acts={"source": "env:playbook", "max_steps": 12}, far={"model": "policy"},
                  apart="its clients act in environments and hold no rows; tests/methods/test_skill_r1 tries it")
    metrics: ClassVar = {"return": "max", "cut": "min"}
    learns_from, only_fits = "environments", False

    skills: int = knob(8, "skills of a generation that are tried side by side: the group", ge=1)
    inter: float = knob(0.5, "weight of a generation's gain over the one before", ge=0)
    gamma: float = knob(1.0, "how much of later generations counts", gt=0, le=1)
    tasks: int = knob(1, "tasks of a round in each of a client's environments", ge=1)
    test_episodes: int = knob(20, "in each environment, to test", ge=1)

    def check(self, model: Any) -> None:
        if model.task != "environment":
            raise CompositionError(f"method 'skill_r1' writes skills in an environment and data.task = {model.task!r} "
                                   "gives rows, so they do not fit together; data.source = 'env:playbook' works")

    def check_rows(self, labels: Sequence[str], rows: Any) -> None:
        every = [r for some in rows.values() for r in some]
        if odd := next((r for r in every if "generations" not in r), None):
            raise CompositionError(f"method 'skill_r1' writes generations of skills and data.source = "
                                   f"'env:{odd['environment']}' has none, so they do not fit together; 'env:playbook' "
                                   "works")
        if short := next((r for r in every if r["max_steps"] < CHOICES * r["generations"]), None):
            raise CompositionError(f"data.environment.max_steps = {short['max_steps']} cuts skills off: {CHOICES} "
                                   f"choices in each of {short['generations']} generations need "
                                   f"{CHOICES * short['generations']}")

    @on_client(reduce=Mean(by="uniform"), gives="delta?: tree, n: rows, reward: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        start, rng, seen, acts, weights, paid = self.own(msg, client), client.rng("skill_r1"), [], [], [], []
        for row in client.data:
            for _ in range(self.tasks):
                task = {**row, "kind": int(client.env(rng, row).scene.own()[int(rng.integers(row["kinds"]))])}
                done = client.rollout(start, self.skills, rng=rng, on=[task])
                a = self.advantages(np.stack([e.rewards for e in done]))  # [skills, choices of all generations]
                seen += [e.seen for e in done]
                acts += [e.actions for e in done]
                weights.append(a.reshape(-1))
                paid += [e.total for e in done]
        # theta <- theta + eta mean A grad log pi(choice | task, skills before)
        theta = client.improve(start, np.concatenate(seen), np.concatenate(acts), np.concatenate(weights)).theta
        return self.told(client, start, theta, n=client.n, reward=float(np.mean(paid)))

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """A = gamma^(g-1) (r_gi - mean_i r_g + inter (mean r_g - mean r_(g-1))), for every choice of a skill.

        `rewards` [skills, choices]: the last choice of each generation has its reward, which no other is."""
        ends = np.flatnonzero(np.arange(1, rewards.shape[1] + 1) % CHOICES == 0)
        r = rewards[:, ends]  # [skills, generations]
        mean = r.mean(0)
        gain = np.diff(mean, prepend=mean[:1])  # A_inter(1) = 0
        a = (r - mean + self.inter * gain) * self.gamma ** np.arange(len(mean))
        return np.repeat(a, CHOICES, 1)

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return tested(client, self.own(msg, client), client.held_out(msg["on"]), self.test_episodes)


CHOICES = 3
"""Choices of a skill."""

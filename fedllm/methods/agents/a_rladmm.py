"""A-RLADMM: all policies are sent at once over a fading channel that adds them up, and ADMM brings them to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part, tree_map, zeros_like
from fedllm.core.reduce import Total
from fedllm.core.rng import torch_stream
from fedllm.methods._acting import learn, seen_in, tested, worth

RIG = {"rig": "tool_worlds", "metric": "elsewhere", "relative": "difference", "holds": ">", "threshold": 0.0,
       "grid": {"lr": (20.0, 40.0, 80.0)}}
WORLD = {"env": "desk", "rounds": 20}


@dataclass(frozen=True)
class ARLADMM(Star):
    """min sum_n -J_n(theta_n) subject to h_n theta_n = h_n Theta; what the server hears is sum_n h_n s_n + noise."""

    card = Card(
        title="A-RLADMM: reinforcement learning by ADMM over the air",
        paper="Krouka, Elgabli, Ben Issaid, Bennis, Communication-Efficient and Federated Multi-Agent Reinforcement "
              "Learning, IEEE TCCN 8(1), 2022",
        topic="agents",
        sends="down: the policy; up: h (h theta + lambda / rho) and h^2, of which the server hears the sum over all "
              "clients, once through the channel; no observation, action or reward",
        needs="environments (data.source env:NAME), model.name policy, space full, local.optimizer sgd",
        claim=Claim("at 10 dB over a Rayleigh channel the consensus policy returns more than by averaging over the "
                    "same channel without duals, on as many channel uses", baseline="a_rladmm",
                    options={**WORLD, "knobs": {"snr_db": 10.0}},
                    against={"knobs": {"snr_db": 10.0, "duals": False}}, **RIG),
        also={"alone": Claim("it returns more over everybody's worlds than policies that are trained alone, on as many "
                             "episodes", baseline="fed_marl", options={**WORLD, "knobs": {"snr_db": 10.0}},
                             against={"alone": True}, **RIG),
              "consensus": Claim("without noise, on quadratic losses, it ends at the exact consensus optimum in 200 "
                                 "rounds", rig="consensus", metric="distance", holds="<=", threshold=1e-4,
                                 kind="exact")},
        evidence="Equations from a dossier, as remembered of the analog ADMM that it builds on. Gains are real, one "
                 "for a client and `coherence` rounds: where they change in each, the fixed point moves (0.1 to 0.3 "
                 "off on the quadratics). Noise is set against the summed signal, in the place of a common power "
                 "scaling. The paper's agents share one world, ours have one each. Against averaging over the same "
                 "channel ten seeds leave it open (0.03 more).",
    )
    trial = Trial({"episodes": 2, "test_episodes": 2}, {"name": "full"}, {"optimizer": "sgd", "lr": 5.0},
                  acts={"source": "env:gridworld", "side": 3, "walls": 1, "max_steps": 8}, far={"model": "policy"},
                  apart="its clients act in environments and hold no rows; tests/methods/test_a_rladmm tries it")
    metrics: ClassVar = {"return": "max", "cut": "min"}
    learns_from, only_fits = "environments", False

    rho: float = knob(0.01, "weight of the consensus against -J", gt=0)
    duals: bool = knob(True, "false: FedAvg over the same channel, for comparison")
    fading: bool = knob(True, "gains of a Rayleigh channel; false: 1")
    weakest: float = knob(0.2, "gains below this are raised to it: nobody sends into a deeper fade", gt=0, le=1)
    coherence: int = knob(10, "rounds in which a gain stays as it is", ge=1)
    snr_db: float | None = knob(None, "of the summed signal, in dB; None: no noise (digital)", ge=-10, le=60)
    noise_seed: int = knob(0, "of the receiver's noise", ge=0)
    episodes: int = knob(8, "of a round at each client", ge=1)
    gamma: float = knob(0.97, "discount", ge=0, lt=1)
    critic_lr: float = knob(0.3, "how far the critic moves to what was seen", gt=0, le=1)
    test_episodes: int = knob(20, "in each environment, to test", ge=1)

    def check(self, model: Any) -> None:
        if model.task != "environment":
            raise CompositionError(f"method 'a_rladmm' acts in environments and data.task = {model.task!r} gives rows, "
                                   "so they do not fit together; data.source = 'env:gridworld' works")

    def check_work(self, local: Any, rounds: int) -> None:
        if local.optimizer != "sgd" or local.momentum or local.weight_decay:
            raise RecipeError(f"local.optimizer = {local.optimizer!r}, momentum = {local.momentum:g}, weight_decay = "
                              f"{local.weight_decay:g}: 'a_rladmm' steps along the plain gradient; allowed is sgd "
                              "without either")

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "round": 0, "channel_uses": 0}

    @on_client(reduce=Total(), gives="y: tree, hh: number, total: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        center, rng = part(msg, "theta"), client.rng("a_rladmm")
        mine, dual = client.memory.get("theta", center), client.memory.get("dual") or zeros_like(center)
        if self.duals and "gain" in client.memory:  # lambda <- lambda + rho h (theta - Theta), once Theta has arrived
            dual = moved(dual, mine, center, float(client.memory["gain"]), self.rho)
        h = self.gain(client, rng, msg["round"])
        start = mine if self.duals else center
        done = client.rollout(start, self.episodes, rng=rng)
        seen, actions, g = seen_in(done, self.gamma)
        advantage = g - worth(client, seen)
        learn(client, seen, g, self.critic_lr)
        up = client.improve(start, seen, actions, advantage).theta  # theta + eta grad J
        if self.duals:  # argmin of the linearized -J + <lambda, h (theta - Theta)> + rho/2 |h (theta - Theta)|^2
            up = nearest(up, center, dual, h, self.rho, client.training.lr)  # + |theta - theta_old|^2 / (2 eta)
            client.memory.update(theta=up, dual=dual, gain=h)
        return pack(y=tree_map(lambda t, v: h * (h * t + v / self.rho), up, dual), hh=h * h,
                    total=float(sum(e.total for e in done)))

    def gain(self, client: Client, rng: np.random.Generator, round: int) -> float:
        """|h_n| of this client's channel."""
        drawn = float(abs(rng.normal() + 1j * rng.normal()) / 2**0.5)
        if not self.fading:
            return 1.0
        if "fade" not in client.memory or round % self.coherence == 0:
            client.memory["fade"] = max(self.weakest, drawn)
        return client.memory["fade"]

    def down(self, state: State, client) -> Payload:
        return pack(theta=state["theta"], round=state["round"])

    def merge(self, state: State, out: Any) -> State:
        y = part(out.value, "y")  # Theta = (sum_n h_n s_n + z) / sum_n h_n^2
        if self.snr_db is not None:
            rng, size = torch_stream("air", self.noise_seed, state["round"]), sum(t.numel() for t in y.values())
            power = sum(float(t.double().pow(2).sum()) for t in y.values()) / size
            sigma = (power / 10 ** (self.snr_db / 10)) ** 0.5
            y = tree_map(lambda t: t + sigma * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype), y)
        theta = tree_map(lambda t: t / out.value["hh"], y)
        uses = sum(t.numel() for t in theta.values())  # as many as there are weights, however many send
        return {**state, "theta": theta, "round": state["round"] + 1, "channel_uses": state["channel_uses"] + uses}

    def report(self, state: State) -> Mapping[str, Any]:
        return {"channel_uses": state["channel_uses"]}

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return tested(client, part(msg, "theta"), client.held_out(msg["on"]), self.test_episodes)


def nearest(up: Tree, center: Tree, dual: Tree, h: float, rho: float, lr: float) -> Tree:
    """(up / eta + rho h^2 Theta - h lambda) / (1 / eta + rho h^2), up = theta + eta grad J."""
    return tree_map(lambda u, c, v: (u / lr + rho * h * h * c - h * v) / (1 / lr + rho * h * h), up, center, dual)


def moved(dual: Tree, theta: Tree, center: Tree, h: float, rho: float) -> Tree:
    """lambda + rho h (theta - Theta)."""
    return tree_map(lambda v, t, c: v + rho * h * (t - c), dual, theta, center)

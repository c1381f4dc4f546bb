"""Worlds in words with tools: the same environments for agents alone, pooled and federated."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines.client import server_info
from fedllm.engines.world import World
from fedllm.environments.registry import bounded
from fedllm.local.spec import LocalSpec
from fedllm.methods._bandit import Arms
from fedllm.methods.agents.a_rladmm import moved, nearest
from fedllm.methods.registry import method_class
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.policy import make_policy
from fedllm.spaces import make_space

CLIENTS = 4


def scenes(name: str, seed: int, pooled: bool = False, clients: int = CLIENTS, max_steps: int = 8,
           **told: Any) -> Federation:
    """Clients' environments; pooled: one client that has all of them."""
    fed = environments(f"env:{name}", EnvironmentSpec(clients=clients, max_steps=max_steps, **told), seed)
    if not pooled:
        return fed
    return Federation({"all": Shard(fed.test, fed.test)}, fed.test, "environment")


@functools.cache
def embedded() -> Model:
    """The model that comes with the package, read and never trained."""
    return load_model("embedded", "generation", make_space("lora"))


def policy(fed: Federation, seed: int, hidden: Sequence[int] = ()) -> Model:
    """A small policy as wide as these environments ask for."""
    scene = bounded(fed.test[0], np.random.default_rng(0)).scene
    return make_policy(scene.size, scene.actions, hidden, make_space("full"), seed=seed)


def acted(trial: Trial, alone: bool) -> Metrics:
    """`return` and `cut` of the clients at home, and `elsewhere`: in all environments."""
    trial.engine.begin(trial.t)
    home = trial.scores("local").values()
    infos = trial.world.infos() if alone else [server_info()]
    all_ = drive(trial.method.evaluate(trial.state, infos, "global"), trial.engine).values()
    mean = lambda got, name: float(np.mean([r[name] for r in got])) if got else 0.0  # noqa: E731
    return {"return": mean(home, "return"), "cut": mean(home, "cut"), "elsewhere": mean(all_, "return"),
            "work_rounds": float(trial.t)}


def tool_worlds(method: str, seed: int, *, env: str = "sums", rounds: int = 6, alone: bool = False,
                pooled: bool = False, lr: float = 20.0, knobs: Mapping[str, Any] | None = None,
                told: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients that each know two of the four ways in which a question is put; the same episodes for every arm."""
    torch.set_num_threads(1)
    fed = scenes(env, seed, pooled, **(told or {}))
    model = embedded() if method_class(method).learns_from == "words" else policy(fed, seed)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=lr), seed)
    run = Trial(method, world, {**(knobs or {}), **({"share": "nothing"} if alone else {})}).rounds(rounds)
    return acted(run, alone)


def bandit_sums(method: str, seed: int) -> Metrics:
    """`error`: how far clients' statistics, added up in any order, are from those of one who saw every step, and the
    inverse by rank-one updates from the inverse."""
    rng, d, actions = np.random.default_rng(seed), 8, 3
    every = [[(int(rng.integers(actions)), rng.normal(0, 1, d), float(rng.integers(2))) for _ in range(50)]
             for _ in range(4)]
    made = []
    for steps in [*every, [s for some in every for s in some]]:
        arms = Arms(np.stack([np.eye(d)] * actions), np.zeros((actions, d)))
        for step in steps:
            arms.learn(*step)
        made.append(arms)
    order = rng.permutation(4)
    a, b = (sum(getattr(made[int(k)], n) for k in order) for n in ("da", "db"))
    inverse = np.linalg.inv(np.eye(d) + made[4].da)
    return {"error": float(max(np.abs(a - made[4].da).max(), np.abs(b - made[4].db).max(),
                               np.abs(inverse - made[4].inverse).max()))}


def consensus(method: str, seed: int, *, rounds: int = 200, clients: int = 5, d: int = 6) -> Metrics:
    """`distance` of Theta to the minimum of the sum of quadratics a_n/2 |theta - c_n|^2, `duals`: the largest entry of
    sum_n h_n lambda_n after a round. The method's own equations, with gradients in the place of episodes."""
    rng, rho, lr = np.random.default_rng(seed), 0.7, 0.5
    a, c = rng.uniform(0.5, 1.5, clients), torch.from_numpy(rng.normal(0, 2, (clients, d)))
    center = {"w": torch.zeros(d, dtype=torch.float64)}
    theta, dual, worst = [dict(center)] * clients, [dict(center)] * clients, 0.0
    h = rng.uniform(0.7, 1.3, clients)
    for _ in range(rounds):
        y = torch.zeros(d, dtype=torch.float64)
        for n in range(clients):
            up = {"w": theta[n]["w"] - lr * a[n] * (theta[n]["w"] - c[n])}
            theta[n] = nearest(up, center, dual[n], h[n], rho, lr)
            y += h[n] * (h[n] * theta[n]["w"] + dual[n]["w"] / rho)
        center = {"w": y / float((h**2).sum())}
        dual = [moved(dual[n], theta[n], center, h[n], rho) for n in range(clients)]
        worst = max(worst, float(sum(h[n] * dual[n]["w"] for n in range(clients)).abs().max()))
    best = torch.einsum("n,nd->d", torch.from_numpy(a), c) / a.sum()
    return {"distance": float((center["w"] - best).norm()), "duals": worst}


RIGS = {"consensus": consensus, "tool_worlds": tool_worlds, "bandit_sums": bandit_sums}

"""Rigs in virtual time: a fleet of declared speeds, time to a target, and who is asked how often."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.rigs.topics import CLASSES, VOCAB, documents, topics
from evidence.rigs.trials import Quadratic
from fedllm.core.client import ClientInfo, Fleet, Profile
from fedllm.core.errors import QuorumError
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Tree
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.core.select import Turn
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.selectors.registry import make_selector
from fedllm.spaces import make_space

Metrics = dict[str, float]
ALL_AT_ONCE = ("fedbuff", "fedasync")
"""Methods that choose among all clients themselves."""


@dataclass
class Race:
    """One method under one selector on one fleet, against the virtual clock."""

    name: str
    world: World
    asked: int
    knobs: Mapping[str, Any] = field(default_factory=dict)
    selector: str = "uniform"
    selector_knobs: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 100
    kind: type[InProcess] = Vectorized
    below: Sequence[Layer] = ()
    """Further layers, next to the wire."""

    def __post_init__(self) -> None:
        self.method = make_method(self.name, **self.knobs)
        self.clients = self.world.infos()
        chooser = make_selector(self.selector, self.selector_knobs)
        self.chooser: Any = chooser.bind(Facts(rounds=self.rounds, cohort=self.asked))
        self.layers = [*([self.chooser] if self.chooser.hears else []), *self.below]
        self.engine: Any = self.kind((self.method, *self.layers), self.world)
        self.mine = self.chooser.init()
        self.states = [self.mine if x is self.chooser else x.init() for x in self.layers]
        self.state: Any = self.method.init(self.world.model)
        self.t = 0

    def round(self) -> None:
        """One round: choose, ask, merge."""
        self.engine.begin(self.t)
        turn = Turn(self.clients, len(self.clients) if self.name in ALL_AT_ONCE else self.asked, self.t,
                    numpy_stream(self.world.seed, self.t, "cohort"), self.mine, self.method, self.state)
        try:
            picks = set(drive(self.chooser.choose(turn), self.engine))
            cohort = [c for c in self.clients if c.id in picks]
            self.state = drive(self.method.round(self.state, cohort), self.engine, self.layers, self.states)
            self.engine.commit()
        except QuorumError:
            self.engine.abandon()
        self.t += 1

    @property
    def theta(self) -> Tree:
        return self.method.served(self.state)[0]

    def until(self, reached: Callable[[Tree], bool], most: float = 1e6) -> float:
        """Virtual seconds to the target; `most` when it is not reached."""
        for _ in range(self.rounds):
            self.round()
            if reached(self.theta):
                return self.engine.clock.now
        return most


def quadratic_world(seed: int, clients: int, spread: float, speeds: np.ndarray, *, d: int = 10, lr: float = 0.01,
                    steps: int = 10) -> tuple[World, Callable[[Tensor], float], Tensor]:
    """f_k(w) = 1/2 sum_j a_kj (w_j - c_kj)^2, a ~ U(0.1, 2), c_k = c + N(0, spread^2), c ~ N(0, 9); with it how far
    above its minimum the mean of all f_k is, and where that lies."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "fleet of quadratics")
    a = torch.from_numpy(rng.uniform(0.1, 2, (clients, d)))
    c = torch.from_numpy(rng.normal(0, 3, d) + rng.normal(0, spread, (clients, d)))

    def loss(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        net, good = model.net, batch.labels >= 0
        assert isinstance(net, Quadratic)
        w, k = net.w(batch.ids[:, 0]), batch.labels.clamp(min=0)
        value = 0.5 * (a[k] * (w - c[k]).pow(2)).sum(1) * good
        return value, good.to(value.dtype), torch.zeros_like(value)

    row = np.zeros(1, np.int32)
    fed = Federation({f"c{k:03d}": Shard([Encoded(row, k, 1)]) for k in range(clients)}, [], "classification")  # type: ignore[list-item]
    model = Model(Quadratic(d), None, "classification", make_space("full"), seed=seed, loss=loss)
    spec = LocalSpec(optimizer="sgd", lr=lr, steps=steps, batch_size=1)
    profiles = {k: Profile(speed=float(s)) for k, s in zip(fed.clients, speeds, strict=True)}
    best = (a * c).sum(0) / a.sum(0)
    value = lambda w: float(0.5 * (a * (w - c).pow(2)).sum(1).mean())  # noqa: E731
    return World(model, fed, spec, seed, profiles, fleet=Fleet()), lambda w: value(w) - value(best), best


def lognormal(seed: int, clients: int, sigma: float = 1.0) -> np.ndarray:
    """Speeds around 1."""
    return np.exp(numpy_stream(seed, "speeds").normal(0, sigma, clients))


def asynchrony(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, asked: int = 10, clients: int = 50,
               spread: float = 0.5, sigma: float = 1.0, rounds: int = 600,
               local: Mapping[str, Any] | None = None) -> Metrics:
    """Virtual `seconds` until the mean of 50 quadratics is within 1 % of the way, with log-normal speeds and
    10 clients at work (13 asked for 10, with `asked`; plain FedAvg always asks 10)."""
    world, above, _ = quadratic_world(seed, clients, spread, lognormal(seed, clients, sigma), **(local or {}))
    start = above(torch.zeros(10))
    race = Race(method, world, asked if method == "stragglers" else 10, dict(knobs or {}), rounds=rounds)
    seconds = race.until(lambda theta: above(theta["w.weight"][0]) <= 0.01 * start)
    report = race.method.report(race.state) or {}
    mean = float(report["staleness"]["mean"]) if report else 0.0
    return {"seconds": seconds, "rounds": float(race.t), "staleness": mean}


def unequal_steps(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, clients: int = 10,
                  rounds: int = 150) -> Metrics:
    """Deadline of 40 steps of the fastest; the slowest makes 2. Distance from the optimum, FedNova's over plain's."""
    speeds = np.geomspace(0.05, 1.0, clients)
    ends = {}
    for kind in ("none", "fednova"):
        world, _, best = quadratic_world(seed, clients, 3.0, speeds, lr=0.02, steps=40)
        race = Race(method, world, clients, {"over": 1.0, "deadline": 40.0, "normalize": kind, **(knobs or {})})
        for _ in range(rounds):
            race.round()
        ends[kind] = float((race.theta["w.weight"][0] - best).norm())
    return {"ratio": ends["fednova"] / ends["none"], **ends}


def draws(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, clients: int = 100, asked: int = 10,
          rounds: int = 200) -> Metrics:
    """How often each client is asked, with log-normal sizes; nobody trains."""
    sizes = np.exp(numpy_stream(seed, "sizes").normal(3, 1, clients)).astype(int) + 1
    infos = [ClientInfo(f"c{k:03d}", int(n)) for k, n in enumerate(sizes)]
    chooser, count = make_selector(method, dict(knobs or {})), np.zeros(clients)
    for r in range(rounds):
        turn = Turn(infos, asked, r, numpy_stream(seed, r, "cohort"), {}, None, {})  # type: ignore[arg-type]
        picks = set(chooser.pick(turn))
        count += np.array([c.id in picks for c in infos])
    return {"most_over_least": float(count.max() / max(1.0, count.min())),
            "with_size": float(np.corrcoef(sizes, count)[0, 1])}


class Bag(nn.Module):
    """Softmax regression on bags of words: an embedding of every word into the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Embedding(VOCAB, len(CLASSES))
        nn.init.zeros_(self.w.weight)


def bag_loss(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each document."""
    net: Any = model.net
    z, good = net.w(batch.ids).mean(1) * 4, batch.labels >= 0  # [N, classes]
    y = batch.labels.clamp(min=0)
    hit = (z.argmax(1) == y) & good
    return F.cross_entropy(z, y, reduction="none") * good, good.to(z.dtype), hit.to(z.dtype)


@functools.lru_cache(maxsize=8)
def bags(seed: int, clients: int, alpha: float) -> tuple[Federation, Tensor, Tensor]:
    """Documents on eight topics: clients of log-normal sizes with Dirichlet(alpha) label mixes; 1000 test documents."""
    rng = numpy_stream(seed, "bags")
    words, shards = topics(rng, len(CLASSES)), {}
    for k in range(clients):
        n, mix = int(np.clip(np.exp(rng.normal(3, 0.7)), 8, 150)), rng.dirichlet([alpha] * len(CLASSES))
        shards[f"c{k:03d}"] = Shard(documents(rng, words, rng.choice(len(CLASSES), n, p=mix), 0.22))  # type: ignore[arg-type]
    test = documents(rng, words, rng.integers(0, len(CLASSES), 1000), 0.22)
    fed = Federation(shards, test, "classification", CLASSES)  # type: ignore[arg-type]
    return fed, torch.from_numpy(np.stack([e.ids for e in test])).long(), torch.tensor([int(e.labels) for e in test])


def bag_race(selector: str, seed: int, knobs: Mapping[str, Any], clients: int, alpha: float, rounds: int,
             asked: int = 10, below: Sequence[Layer] = (),
             declared: Callable[[Iterable[str]], dict[str, Profile]] | None = None
             ) -> tuple[Race, Callable[[Tree], tuple[float, float]]]:
    """FedAvg under a selector, and how to read test loss and accuracy off a state; without `declared` profiles clients
    have log-normal speeds and time is virtual."""
    torch.set_num_threads(1)
    fed, ids, labels = bags(seed, clients, alpha)
    model = Model(Bag(), None, "classification", make_space("full"), labels=CLASSES, seed=seed, loss=bag_loss)
    profiles = declared(fed.clients) if declared else {
        c: Profile(speed=float(s)) for c, s in zip(fed.clients, lognormal(seed, clients), strict=True)}
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=2.0, steps=10, batch_size=16), seed, profiles,
                  fleet=None if declared else Fleet())

    def score(theta: Tree) -> tuple[float, float]:
        z = F.embedding(ids, theta["w.weight"]).mean(1) * 4
        return float(F.cross_entropy(z, labels)), float((z.argmax(1) == labels).float().mean())

    return Race("fedavg", world, asked, {}, selector, knobs, rounds, below=below), score


def oort_time(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, clients: int = 60,
              alpha: float = 0.1, rounds: int = 150, low: float = 0.6, high: float = 0.83) -> Metrics:
    """FedAvg under a selector on 60 clients of strong label skew and log-normal speeds: virtual seconds to a low and a
    high accuracy (never: as long as 10 times the run), and the accuracy at the end, a mean over the last ten rounds."""
    race, score = bag_race(method, seed, dict(knobs or {}), clients, alpha, rounds)
    at, last = {"low": math.inf, "high": math.inf}, []
    for _ in range(rounds):
        race.round()
        got = score(race.theta)[1]
        last.append(got)
        for name, target in (("low", low), ("high", high)):
            if got >= target:
                at[name] = min(at[name], race.engine.clock.now)
    now = race.engine.clock.now
    return {"accuracy": float(np.mean(last[-10:])), "best": max(last), "seconds": now,
            **{f"seconds_{n}": min(s, 10 * now) for n, s in at.items()}}


def select_skew(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, clients: int = 60,
                alpha: float = 0.1, rounds: int = 60) -> Metrics:
    """The same federation after 60 rounds: mean and worst (95th percentile) training loss over the clients."""
    race, score = bag_race(method, seed, dict(knobs or {}), clients, alpha, rounds)
    for _ in range(rounds):
        race.round()
    w = race.theta["w.weight"]
    losses = []
    for shard in race.world.federation.clients.values():
        rows: Sequence[Any] = shard.train
        z = F.embedding(torch.from_numpy(np.stack([e.ids for e in rows])).long(), w).mean(1) * 4
        losses.append(float(F.cross_entropy(z, torch.tensor([int(e.labels) for e in rows]))))
    loss, accuracy = score(race.theta)
    return {"worst_loss": float(np.quantile(losses, 0.95)), "mean_loss": float(np.mean(losses)), "loss": loss,
            "accuracy": accuracy, "seconds": race.engine.clock.now}


RIGS: dict[str, Callable[..., Metrics]] = {
    "asynchrony": asynchrony, "unequal_steps": unequal_steps, "draws": draws,
    "oort_time": oort_time, "select_skew": select_skew}

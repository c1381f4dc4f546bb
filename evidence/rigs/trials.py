"""Small experiments on which claims are measured: `RIGS[name](method, seed, **options)` gives metrics by name.

Every rig compares on the same work: same start, data, rounds and local steps for each method. They fit one CPU core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from fedllm.core.client import ClientInfo, Profile
from fedllm.core.layer import Layer
from fedllm.core.payload import Tree, tensor_bytes
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.requests import Fit, Fitted
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.spaces.lora import factors

Metrics = dict[str, float]


def label_skew(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, ranks: Sequence[int] = (),
               space: Mapping[str, Any] | None = None, local: Mapping[str, Any] | None = None,
               rounds: int = 15) -> Metrics:
    """Topic classification, eight clients by Dirichlet(0.1) over eight labels, LoRA on a pre-trained encoder.

    `global_*` on the IID test: the deployed model, or the mean over the clients' own where there is none.
    `local_*` on rows drawn with each client's own label mix.
    """
    torch.set_num_threads(1)
    lora = make_space("lora", **{"rank": 4, "alpha": 8.0, "targets": ("query", "value"), **(space or {})})
    fed = topic_federation(seed)
    model = Model(pretrained(seed), None, "classification", lora, labels=CLASSES, seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    profiles = {c: Profile(rank=r) for c, r in zip(fed.clients, ranks, strict=False)}
    run = Trial(method, World(model, fed, spec, seed, profiles), dict(knobs or {})).rounds(rounds)
    wire = run.engine.record.totals()
    out = {"train_bytes": float(wire["up"] + wire["down"]), "up_bytes": float(wire["up"]), **run.work()}
    for on in ("global", "local"):
        scores = run.scores(on).values()
        out |= {f"{on}_{m}": float(np.mean([s[m] for s in scores])) for m in ("loss", "accuracy")}
    return out


class Quadratic(nn.Module):
    """One point w in d dimensions, as the only row of an embedding (which has a stacked form)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Embedding(1, d, dtype=torch.float64)
        nn.init.zeros_(self.w.weight)


def quadratic_world(method: str, seed: int, knobs: Mapping[str, Any] | None, rounds: int, clients: int, d: int,
                    local: Mapping[str, Any]) -> tuple[Trial, Tensor, Tensor]:
    """A run over clients whose losses are f_k(w) = 1/2 sum_j a_kj (w_j - c_kj)^2 with a ~ U(0.1, 2), c ~ N(0, 9):
    the trial after its rounds, a and c [clients, d]."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "quadratic")
    a = torch.from_numpy(rng.uniform(0.1, 2, (clients, d)))
    c = torch.from_numpy(rng.normal(0, 3, (clients, d)))

    def loss(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        net, good = model.net, batch.labels >= 0
        assert isinstance(net, Quadratic)
        w, k = net.w(batch.ids[:, 0]), batch.labels.clamp(min=0)  # [N, d]; a row's label is its client's number
        value = 0.5 * (a[k] * (w - c[k]).pow(2)).sum(1) * good
        return value, good.to(value.dtype), torch.zeros_like(value)

    row = np.zeros(1, np.int32)
    fed = Federation({f"client-{k}": Shard([Encoded(row, k, 1)]) for k in range(clients)}, [], "classification")  # type: ignore[list-item]
    model = Model(Quadratic(d), None, "classification", make_space("full"), seed=seed, loss=loss)
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.2, "steps": 20, "batch_size": 1, **local})
    return Trial(method, World(model, fed, spec, seed), dict(knobs or {})).rounds(rounds), a, c


def above_least(a: Tensor, c: Tensor, w: Tensor) -> float:
    """How far the mean of the clients' f_k at w is above its minimum."""
    value = lambda x: 0.5 * (a * (x - c).pow(2)).sum(1).mean()  # noqa: E731
    return float(value(w) - value((a * c).sum(0) / a.sum(0)))


def quadratic(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 100, clients: int = 6,
              d: int = 10, local: Mapping[str, Any] | None = None) -> Metrics:
    """`distance` to the minimum of the mean of quadratic losses, and how far above it the mean's value is
    (`suboptimality`)."""
    run, a, c = quadratic_world(method, seed, knobs, rounds, clients, d, local or {})
    w = run.method.served(run.state)[0]["w.weight"][0]
    return {"distance": float((w - (a * c).sum(0) / a.sum(0)).norm()), "suboptimality": above_least(a, c, w),
            **run.work()}


class Scripted(InProcess):
    """Clients whose training moves every trainable by a random step: aggregation is all that is left to see.

    `took` and `made` are of the last question that had clients train.
    """

    def answers(self, jobs):
        self.begins = True
        for job in jobs:
            yield job, self.work(job, self.train)

    def train(self, fit: Fit) -> Fitted:
        import fnmatch

        if self.begins:
            self.took: dict[str, Fit] = {}
            self.made: dict[str, Tree] = {}
            self.begins = False
        rng = torch_stream(self.world.seed, self.round, fit.client, "scripted")
        stays = {n for n in fit.theta if any(fnmatch.fnmatch(n, f) for f in fit.freeze)}
        theta = {n: t if n in stays else t + torch.randn(t.shape, generator=rng).to(t.dtype)
                 for n, t in fit.theta.items()}
        self.took[fit.client], self.made[fit.client] = fit, theta
        return Fitted(theta, 1.0, 1, 1, 1, 1.0)


RANKS = (1, 2, 4, 8)
RAGGED = ("flora_stacking", "hetlora", "flexlora")


def exactness(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 2,
              dtype: str = "float32", rank: int | None = None) -> Metrics:
    """How far the deployed update is from sum_k p_k s_k B_k A_k, on random factors of non-square modules.

    Four clients, of ranks 1, 2, 4 and 8 where the method allows it and of rank 8 otherwise. `error` is relative and
    the largest over the rounds; `spectrum` is what the best update of rank 8 would be off by (Eckart and Young).
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16)).to(getattr(torch, dtype))
    scaling = "shared" if method == "hetlora" else "classic"
    space = make_space("lora", rank=rank or max(RANKS), alpha=16.0, scaling=scaling,
                       targets=("k_proj", "v_proj", "up_proj", "down_proj"))
    model = Model(net, None, "generation", space, seed=seed)
    row = Encoded(np.arange(8, dtype=np.int32), np.arange(8), 8)
    fed = Federation({f"client-{k}": Shard([row] * (k + 1)) for k in range(len(RANKS))}, [], "generation")  # type: ignore[list-item]
    profiles = {c: Profile(rank=r) for c, r in zip(fed.clients, RANKS, strict=True)} if method in RAGGED else {}
    quiet = {"lambda_reg": 0.0, "prune": False} if method == "hetlora" else {}
    run = Trial(method, World(model, fed, LocalSpec(), seed, profiles), {**quiet, **(knobs or {})}, Scripted)
    error = tail = 0.0
    for _ in range(rounds):
        run.rounds(1)
        got, want = update(space, *run.method.served(run.state)), wanted(run, space)
        error = max(error, off(got, want))
        tail = max(tail, off({p: best_of_rank(m, max(RANKS)) for p, m in want.items()}, want))
    sent = [e for e in run.engine.record.events if e["kind"] == "wire" and e["round"] == rounds - 1]
    by = {way: {e["client"]: e["bytes"] for e in sent if e["direction"] == way and "local" in e["phase"]}
          for way in ("up", "down")}
    fitted = run.engine.made
    return {"error": error, "spectrum": tail, "upload": float(max(by["up"].values())),
            "download": float(max(by["down"].values())), "weakest_upload": float(min(by["up"].values())),
            "factor_bytes": float(max(tensor_bytes(t) for t in fitted.values()))}


def update(space: Any, theta: Tree, base: Tree | None = None) -> dict[str, Tensor]:
    """drift + s B A of every module, fp64."""
    pairs = {p: (b.double(), a.double()) for p, (b, a) in factors(theta).items()}
    out = {p: space.scale(a.shape[0]) * (b @ a) for p, (b, a) in pairs.items()}
    return {p: m + base[f"{p}.weight"].double() if base else m for p, m in out.items()}


def wanted(run: Trial, space: Any) -> dict[str, Tensor]:
    """The examples-weighted mean of what the clients would each deploy."""
    n = {c.id: c.n for c in run.world.infos()}
    each = {c: update(space, run.engine.made[c], fit.base) for c, fit in run.engine.took.items()}
    total = sum(n[c] for c in each)
    return {p: sum(n[c] / total * each[c][p] for c in each) for p in next(iter(each.values()))}  # type: ignore[misc]


def off(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Relative Frobenius error over all modules."""
    gap = sum(float((got[p] - m).pow(2).sum()) for p, m in want.items())
    return (gap / sum(float(m.pow(2).sum()) for m in want.values())) ** 0.5


def best_of_rank(m: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r."""
    u, s, vt = torch.linalg.svd(m)
    return (u[:, :r] * s[:r]) @ vt[:r]


def tiny_lm(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6, space: str = "full",
            local: Mapping[str, Any] | None = None, sizes: Sequence[int] = (32, 48)) -> Metrics:
    """A 2-layer Llama from scratch on sequences of a Markov chain, four clients.

    `fall` is by how much the loss on held-out rows fell, of the smallest model; `bytes_round_trip` is what one client
    sends and gets in a round, the largest over model `sizes`, and `bytes_spread` by how much it differs between them.
    """
    torch.set_num_threads(1)
    trips, falls, work = [], [], {}
    for hidden in sizes:
        model = Model(_tiny_llama(hidden, seed), None, "generation", make_space(space), seed=seed)
        spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": 10, "batch_size": 8, **(local or {})})
        world = World(model, _chain(seed), spec, seed, exact_match=False)
        run = Trial(method, world, dict(knobs or {}))
        before = np.mean([s["loss"] for s in run.scores("global").values()])
        run.rounds(rounds if hidden == sizes[0] else 1)
        work = work or run.work()
        falls.append(before - np.mean([s["loss"] for s in run.scores("global").values()]))
        first = [e for e in run.engine.record.events if e["kind"] == "wire" and "score" not in e["phase"]]
        trips.append(max(sum(e["bytes"] for e in first if e["client"] == c and e["round"] == 0)
                         for c in world.federation.clients))
    return {"fall": float(falls[0]), "bytes_round_trip": float(max(trips)),
            "bytes_spread": float(max(trips) - min(trips)), **work}


def _tiny_llama(hidden: int, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32))


def _chain(seed: int) -> Federation:
    """Each token has four likely successors; one chain for all."""
    rng = numpy_stream(seed, "chain")
    after = rng.integers(0, 64, (64, 4))

    def rows(n: int) -> list[Encoded]:
        out = []
        for _ in range(n):
            ids = [int(rng.integers(64))]
            while len(ids) < 16:
                ids.append(int(after[ids[-1], min(3, rng.geometric(0.6) - 1)]))
            labels = np.array(ids)
            labels[0] = -100
            out.append(Encoded(np.array(ids, np.int32), labels, 15))
        return out

    return Federation({f"client-{k}": Shard(rows(64), rows(8)) for k in range(4)}, rows(64), "generation")  # type: ignore[arg-type]


@dataclass
class Trial:
    """One method on one world, round after round."""

    name: str
    world: World
    knobs: dict[str, Any]
    kind: type[InProcess] = Vectorized
    layers: Sequence[Layer] = ()
    state: Any = field(init=False)

    def __post_init__(self) -> None:
        self.method = make_method(self.name, **self.knobs)
        self.engine: Any = self.kind((self.method, *self.layers), self.world)
        self.states = [layer.init() for layer in self.layers]
        self.state = self.method.init(self.world.model)
        self.t = 0

    def rounds(self, count: int, clients: Sequence[ClientInfo] | None = None) -> Trial:
        """So many rounds with these clients, or all."""
        for _ in range(count):
            self.engine.begin(self.t)
            cohort = self.world.infos() if clients is None else clients
            self.state = drive(self.method.round(self.state, cohort), self.engine, self.layers, self.states)
            self.engine.commit()
            self.t += 1
        return self

    def work(self) -> Metrics:
        """Rounds, local steps of all clients together, and rows a step: what both arms of a claim must do alike."""
        spec, clients = self.world.local, len(self.world.infos())
        return {"work_rounds": float(self.t), "work_rows_a_step": float(spec.batch_size),
                "work_steps": float((spec.steps or 0) * self.t * clients)}

    def scores(self, on: str) -> Mapping[str, Metrics]:
        """What each client's model scores; layers take no part in a test."""
        engine = self.engine
        if self.layers:
            engine = self.kind((self.method,), self.world)
            engine.memory = dict(self.engine.memory)
            engine.begin(self.t)
        return drive(self.method.evaluate(self.state, self.world.infos(), on), engine)


RIGS: dict[str, Callable[..., Metrics]] = {
    "label_skew": label_skew, "quadratic": quadratic, "exactness": exactness, "tiny_lm": tiny_lm}

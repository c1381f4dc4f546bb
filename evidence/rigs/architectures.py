"""Rigs of architectures under federation: norms under label skew, nested widths, and what a narrow fit takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from evidence.rigs.topics import CLASSES, VOCAB, documents, topics
from evidence.rigs.trials import Metrics, Trial, _chain, _tiny_llama
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.models.narrow import narrow
from fedllm.spaces import make_space


class Followed(torch.autograd.Function):
    """Passes x on; the gradient of a running statistic is its distance from the batch's, so that plain SGD at rate m
    moves it as BatchNorm of momentum m does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, running: Tensor, seen: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(running - seen)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return g, ctx.saved_tensors[0], None


class Batched(nn.Module):
    """BatchNorm over rows [N, d], whose running statistics are trainables and so are averaged as all else is."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.mean, self.var = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return (x - self.mean) / (self.var.clamp(min=0) + 1e-5).sqrt() * self.weight + self.bias
        mean, var = x.mean(0), x.var(0, unbiased=False)
        y = (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias
        y = Followed.apply(y, self.mean, mean.detach())  # type: ignore[no-untyped-call]
        return Followed.apply(y, self.var, var.detach())  # type: ignore[no-untyped-call]


NORMS: Mapping[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": Batched}


class Bag(nn.Module):
    """Mean of word vectors, two hidden layers with a norm each, eight classes."""

    def __init__(self, norm: str, d: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 32)
        self.one, self.norm_one, self.two, self.norm_two = (
            nn.Linear(32, d), NORMS[norm](d), nn.Linear(d, d), NORMS[norm](d))
        self.out = nn.Linear(d, len(CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm_one(self.one(self.words(ids).mean(1))).relu()
        return self.out(self.norm_two(self.two(h)).relu())


def of_rows(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every row, that it counts, and whether it is right."""
    good = batch.labels >= 0
    z, y = model.net(batch.ids), batch.labels.clamp(min=0)
    loss = F.cross_entropy(z, y, reduction="none") * good
    return loss, good.to(loss.dtype), (z.argmax(1) == y).to(loss.dtype) * good


def norms(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, norm: str = "layer", rounds: int = 20,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """Eight clients of 64 documents, client k of the labels k and k + 1 alone; `global_loss` on 400 of all labels."""
    torch.set_num_threads(1)
    rng, clients = numpy_stream(seed, "norms"), len(CLASSES)
    words = topics(rng, clients)
    made = lambda labels: documents(rng, words, labels, 0.35)  # noqa: E731
    fed = Federation({f"c{k}": Shard(made((k + rng.integers(0, 2, 64)) % clients)) for k in range(clients)},  # type: ignore[arg-type]
                     made(rng.integers(0, clients, 400)), "classification", CLASSES)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Bag(norm)
    model = Model(net, None, "classification", make_space("full"), labels=CLASSES, seed=seed, loss=of_rows)
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": 8, "batch_size": 16, **(local or {})})
    run = Trial(method, World(model, fed, spec, seed), dict(knobs or {})).rounds(rounds)
    return {"global_loss": float(np.mean([s["loss"] for s in run.scores("global").values()])), **run.work()}


def widths(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
           only: Sequence[int] = (), local: Mapping[str, Any] | None = None) -> Metrics:
    """A 2-layer Llama of width 32 from scratch, four clients (or `only` some); `loss` of the whole model on held-out
    rows. With fed_arch's own widths the second and fourth client hold half."""
    torch.set_num_threads(1)
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 10, "batch_size": 8, **(local or {})})
    world = World(model, _chain(seed), spec, seed, exact_match=False)
    run = Trial(method, world, dict(knobs or {}))
    run.rounds(rounds, [c for k, c in enumerate(world.infos()) if not only or k in only])
    theta, rows = run.method.served(run.state)[0], world.federation.test
    return {"loss": run_losses([Losses("held", model, theta, None, rows)], Limits())[0].mean, **run.work()}  # type: ignore[arg-type]


def narrow_memory(method: str, seed: int, *, hidden: int = 256, width: float = 0.5) -> Metrics:
    """`share`: the peak of what a fit of two steps allocates at this width, of that of the whole network."""
    torch.set_num_threads(1)
    model = Model(_tiny_llama(hidden, seed), None, "generation", make_space("full"), seed=seed)
    rows: Any = _chain(seed).clients["client-0"].train[:8]
    peaks = []
    for part in (model, narrow(model, width, True)):
        theta = part.initial()
        fit = Fit("a", part, theta, None, rows, [np.arange(8)] * 2, LocalSpec(optimizer="adamw", batch_size=8))
        run_fits([fit], Limits())  # what is made once is made
        peaks.append(allocated(lambda fit=fit: run_fits([fit], Limits())))  # type: ignore[misc]
    return {"share": peaks[1] / peaks[0], "whole_bytes": peaks[0], "narrow_bytes": peaks[1]}


def allocated(work: Callable[[], Any]) -> float:
    """Bytes at the peak of what this work allocates, as torch's allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(held.max())


RIGS: dict[str, Callable[..., Metrics]] = {"norms": norms, "widths": widths, "narrow_memory": narrow_memory}

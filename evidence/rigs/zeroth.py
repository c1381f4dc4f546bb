"""Rigs for methods that learn from losses alone: a softmax model of 256 weights, and the memory of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evidence.rigs.trials import Metrics, Trial, _chain, _tiny_llama
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.world import World
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.spaces import make_space

KINDS = FEATURES = 16


class Softmax(nn.Module):
    """Multinomial regression; the rows' features lie in it, and a row is its number."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", features)
        self.w = nn.Linear(features.shape[1], KINDS, bias=False)
        nn.init.zeros_(self.w.weight)


def classify(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row, whether it counts, whether it is right."""
    net, good = model.net, batch.labels >= 0
    assert isinstance(net, Softmax)
    z = net.w(net.get_buffer("x")[batch.ids[:, 0]])
    loss = F.cross_entropy(z, batch.labels.clamp(min=0), reduction="none") * good
    return loss, good.to(loss.dtype), ((z.argmax(-1) == batch.labels) & good).to(loss.dtype)


def softmax_world(seed: int, alpha: float | None = None, clients: int = 4, rows: int = 200,
                  batch_size: int = 16) -> World:
    """16 classes of 16-dimensional Gaussian rows by a random teacher; IID clients, or Dirichlet(alpha) over labels."""
    rng = numpy_stream(seed, "softmax")
    total = clients * rows + 1000
    x = rng.normal(size=(total, FEATURES))
    z = 2 * x @ rng.normal(size=(FEATURES, KINDS))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    owner = np.arange(clients * rows) % clients
    if alpha is not None:
        mix = rng.dirichlet([alpha] * clients, KINDS)
        owner = np.array([rng.choice(clients, p=mix[k]) for k in y[: clients * rows]])
    made = [Encoded(np.array([i], np.int32), int(k), 1) for i, k in enumerate(y)]
    shards = {f"client-{k}": Shard([made[i] for i in np.flatnonzero(owner == k)])  # type: ignore[misc]
              for k in range(clients) if (owner == k).any()}
    fed = Federation(shards, made[clients * rows :], "classification")  # type: ignore[arg-type]
    net = Softmax(torch.from_numpy(x).float())
    model = Model(net, None, "classification", make_space("full"), seed=seed, loss=classify)
    return World(model, fed, LocalSpec(optimizer="sgd", lr=0.1, batch_size=batch_size), seed)


def tested(run: Trial) -> Metrics:
    """Loss and accuracy of the served model on the global test."""
    scores = run.scores("global").values()
    return {m: float(np.mean([s[m] for s in scores])) for m in ("loss", "accuracy")}


def softmax(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 30, K: int = 512,
            steps: int = 100, lr: float = 2e-2) -> Metrics:
    """Zeroth-order methods with K seeds on 256 weights, four IID clients: `loss` and `accuracy` on unseen rows."""
    torch.set_num_threads(1)
    run = Trial(method, softmax_world(seed), {"K": K, "steps": steps, "lr": lr, "eps": 1e-3, **(knobs or {})})
    return tested(run.rounds(rounds))


def mezo_rates(method: str, seed: int, *, rounds: int = 30, steps: int = 20, lr: float = 2e-2,
               share: float = 0.5) -> Metrics:
    """Label-skewed clients (Dirichlet 0.3): by how much guided rates end below one rate for all, on the same draws."""
    torch.set_num_threads(1)
    ends = {rates: tested(Trial(method, softmax_world(seed, 0.3), {
        "steps": steps, "lr": lr, "delta": share * lr, "rates": rates}).rounds(rounds))
        for rates in ("round", "frozen")}
    return {"loss": ends["round"]["loss"], "gain": ends["frozen"]["loss"] - ends["round"]["loss"]}


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive of those made inside, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, size)
        return out

    def freed(self, size: int) -> None:
        """One of them is gone."""
        self.now -= size


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that `work` holds at once, apart from those that were there before."""
    with Live() as live:
        work()
    return live.peak


def step_memory(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, hidden: int = 64,
                tokens: int = 256) -> Metrics:
    """Tensors alive in one client's round on a 2-layer Llama with LoRA, against those of a test of the same rows.

    All run under the same `engine.batch_tokens`; the weights count too, since they are in memory as well.
    """
    torch.set_num_threads(1)
    model = Model(_tiny_llama(hidden, seed), None, "generation",
                  make_space("lora", rank=2, targets=("q_proj", "v_proj")), seed=seed)
    whole = _chain(seed)
    fed = Federation({"client-0": Shard(whole.clients["client-0"].train[: tokens // 16])}, [], "generation")
    world = World(model, fed, LocalSpec(optimizer="sgd", steps=2, batch_size=tokens // 16), seed,
                  limits=Limits(batch_tokens=tokens))
    held = sum(p.numel() * p.element_size() for p in model.net.parameters())
    info, theta = world.infos(), model.initial()
    forward = held + peak_bytes(lambda: world_loss(world, theta))
    peaks = {name: held + peak_bytes(lambda n=name, k=k: Trial(n, world, k, InProcess).rounds(1))
             for name, k in ((method, {"steps": 2, **(knobs or {})}), ("fedavg", {}))}
    assert info
    return {"peak_over_forward": peaks[method] / forward, "backprop_over_forward": peaks["fedavg"] / forward}


def world_loss(world: World, theta: Mapping[str, Tensor]) -> float:
    """The loss of client-0's rows."""
    from fedllm.local.forward import run_losses
    from fedllm.local.requests import Losses

    rows = world.encoded("client-0", "train")
    return run_losses([Losses("client-0", world.model, dict(theta), None, rows)], world.limits)[0].mean


RIGS: dict[str, Callable[..., Metrics]] = {"softmax": softmax, "mezo_rates": mezo_rates, "step_memory": step_memory}

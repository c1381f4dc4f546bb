"""A public model, and owners of closed domains beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial, _tiny_llama
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.spaces.space import set_params

PUBLIC, CLOSED = 0, (1, 2, 3)


def texts(seed: int, domain: int, count: int, what: str) -> list[Encoded]:
    """Rows of a domain: 64 words for all, of which it uses some twice as often, and successors of its own."""
    rng, own = numpy_stream(seed, "domain", domain, what), numpy_stream(seed, "successors", domain)
    after, favored = own.integers(0, 64, (64, 3)), own.choice(64, 24, replace=False)
    out = []
    for _ in range(count):
        ids = [int(rng.choice(favored))]
        while len(ids) < 16:
            fresh = rng.random() < 0.15
            ids.append(int(rng.choice(favored) if fresh else after[ids[-1], min(2, rng.geometric(0.7) - 1)]))
        labels = np.array(ids)
        labels[0] = -100
        out.append(Encoded(np.array(ids, np.int32), labels, 15))
    return out


@functools.lru_cache(maxsize=4)
def public_weights(seed: int) -> Tree:
    """A 2-layer Llama after 240 steps on 256 public rows."""
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    rows, rng = texts(seed, PUBLIC, 256, "train"), numpy_stream(seed, "public")
    plan = [rng.choice(256, 16, replace=False) for _ in range(240)]
    spec = LocalSpec(optimizer="adamw", lr=1e-2, steps=240, batch_size=16)
    return run_fits([Fit("public", model, model.initial(), None, rows, plan, spec)], Limits())[0].theta


def domains(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, space: str = "experts",
            rounds: int = 1, local: Mapping[str, Any] | None = None) -> Metrics:
    """Three owners with 128 rows of a domain each, who train once for 80 steps on top of the public model.

    `closed_loss`: on 64 rows of each closed domain, the mean; `over_public`: by how much it is above the public
    model's; `public_loss`: on the public domain. Of experts also `left_apart`, by how much the loss on the first
    owner's domain differs between a merge without it and one that never had it, and `left_rise`, by how much it is
    above that of the merge with it.
    """
    torch.set_num_threads(1)
    net = _tiny_llama(32, seed)
    set_params(net, public_weights(seed))
    model = Model(net, None, "generation", make_space(space), seed=seed)
    shards = {f"owner-{d}": Shard(texts(seed, d, 128, "train"), texts(seed, d, 64, "test")) for d in CLOSED}
    fed = Federation(shards, [], "generation", public=texts(seed, PUBLIC, 64, "more"))  # type: ignore[arg-type]
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 80, "batch_size": 16, **(local or {})})
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), dict(knobs or {})).rounds(rounds)

    def loss(theta: Tree, domain: int) -> float:
        rows = texts(seed, domain, 64, "test")
        return run_losses([Losses("test", model, theta, None, rows)], Limits())[0].mean

    theta = run.method.served(run.state)[0]
    before = [loss(model.initial() if space == "full" else {}, d) for d in CLOSED]
    closed = float(np.mean([loss(theta, d) for d in CLOSED]))
    found = {"closed_loss": closed, "over_public": closed - float(np.mean(before)), "public_loss": loss(theta, PUBLIC),
             **run.work()}
    if "without" in run.method.knobs():
        first = f"owner-{CLOSED[0]}"
        rest = {c: e for c, e in run.state["experts"].items() if c != first}
        never = loss(run.method.served({**run.state, "experts": rest})[0], CLOSED[0])
        left = loss(type(run.method)(without=(first,)).served(run.state)[0], CLOSED[0])
        found |= {"left_apart": abs(left - never), "left_rise": left - loss(theta, CLOSED[0])}
    return found


RIGS: dict[str, Callable[..., Metrics]] = {"domains": domains}

"""Silos whose texts have one grammar and words of their own, from random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial, _tiny_llama
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
from fedllm.spaces.params import tables_of

WORDS, TONGUES = 15, 4
"""Words of an alphabet (word w of tongue k is token 1 + WORDS k + w), and how many there are: three silos have one
each, the fourth nobody."""


@functools.lru_cache(maxsize=4)
def grammar(seed: int) -> np.ndarray:
    """[WORDS, 3]: what may come two places after a word, the likeliest first; the same in every tongue."""
    return numpy_stream(seed, "grammar").integers(0, WORDS, (WORDS, 3))


def texts(seed: int, tongue: int, count: int, what: str) -> list[Encoded]:
    """Rows of one tongue."""
    rng, after = numpy_stream(seed, "tongues", tongue, what), grammar(seed)
    out = []
    for _ in range(count):
        said = [int(w) for w in rng.integers(0, WORDS, 2)]
        while len(said) < 20:
            said.append(int(after[said[-2], min(2, rng.geometric(0.7) - 1)]))
        ids = np.array(said, np.int32) + 1 + WORDS * tongue
        labels = ids.astype(np.int64)
        labels[0] = -100
        out.append(Encoded(ids, labels, len(ids) - 1))
    return out


def moved(model: Model, body: Mapping[str, torch.Tensor], seed: int, lr: float) -> float:
    """The loss on the fourth tongue of fresh embeddings, trained for 40 steps over this body, which is frozen."""
    own = tables_of(model.net)
    rows, start = texts(seed, TONGUES - 1, 64, "train"), model.initial()
    theta = {n: start[n] if n in own else body[n] for n in start}
    spec = LocalSpec(optimizer="adamw", lr=lr, steps=40, batch_size=8)
    rng = numpy_stream(seed, "moved")
    plan = [rng.choice(len(rows), 8, replace=False) for _ in range(40)]
    frozen = tuple(n for n in theta if n not in own)
    [fitted] = run_fits([Fit("moved", model, theta, None, rows, plan, spec, frozen, ())], Limits())
    held = texts(seed, TONGUES - 1, 64, "test")
    return run_losses([Losses("moved", model, fitted.theta, None, held)], Limits())[0].mean


def tongues(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
            local: Mapping[str, Any] | None = None) -> Metrics:
    """A 2-layer Llama from scratch, three silos with 64 rows of 20 words in a tongue of their own.

    `local_loss`: each silo's loss on 32 rows of its tongue, the mean. `moved_loss`: that on a fourth tongue, with new
    embeddings over the frozen body. `up_bytes` are of all rounds.
    """
    torch.set_num_threads(1)
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    fed = Federation({f"silo-{k}": Shard(texts(seed, k, 64, "train"), texts(seed, k, 32, "test"))
                      for k in range(TONGUES - 1)}, [], "generation")  # type: ignore[arg-type]
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 8, **(local or {})})
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), dict(knobs or {})).rounds(rounds)
    up = float(run.engine.record.totals()["up"])
    loss = float(np.mean([s["loss"] for s in run.scores("local").values()]))
    return {"local_loss": loss, "up_bytes": up, "moved_loss": moved(model, run.state["theta"], seed, 1e-2),
            **run.work()}


RIGS: dict[str, Callable[..., Metrics]] = {"tongues": tongues}

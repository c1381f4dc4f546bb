"""Who wrote a text: three small models that learned a language each, and texts of others that did not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from evidence.rigs.leak import SYMBOLS, small_model, walks
from evidence.rigs.trials import Metrics
from fedllm.audits.origin_attribution import Origin, likelihood
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.local.fit import run_fits
from fedllm.local.generate import run_generates
from fedllm.local.requests import Fit, Generate, Limits
from fedllm.local.spec import LocalSpec

MODELS, LENGTH = 3, 24


def learned(model: Any, rows: list[Encoded], steps: int, seed: int) -> Any:
    """Every weight, after so many steps on these rows."""
    rng = numpy_stream(seed, "origin batches")
    plan = [rng.choice(len(rows), 16, replace=False) for _ in range(steps)]
    spec = LocalSpec(lr=3e-3, steps=steps, batch_size=16)
    return run_fits([Fit("origin", model, model.initial(), None, rows, plan, spec)], Limits())[0].theta


def said(model: Any, theta: Any, count: int, seed: int, starts: np.ndarray) -> list[Encoded]:
    """Texts that a model writes from one symbol on."""
    prompts = [np.array([s], np.int32) for s in starts[:count]]
    ask = Generate("origin", model, theta, None, prompts, LENGTH - 1, 1.0, seed)
    out = []
    for first, ids in zip(starts, run_generates([ask], Limits())[0], strict=False):
        full = np.array([int(first), *ids], np.int32)
        labels = full.astype(np.int64)
        labels[0] = -100
        out.append(Encoded(full, labels, len(full)))
    return [row for row in out if len(row.ids) > LENGTH // 2]


def origin(audit: str, seed: int, *, steps: int = 80, texts: int = 60, nobodys: int = 200) -> Metrics:
    """Languages are Markov chains over the same symbols; the reference learned a bit of many other chains.

    `accuracy` of texts sampled from the three models; `false` of texts of a fourth model and of chains that no model
    saw. The margin is calibrated on other texts of nobody's.
    """
    torch.set_num_threads(1)
    rng, model, how = numpy_stream(seed, "origin"), small_model(seed), Origin()
    chain = lambda: rng.integers(0, SYMBOLS, (SYMBOLS, 4))  # noqa: E731
    own = [chain() for _ in range(MODELS + 1)]  # the last one's model is no candidate
    thetas = [learned(model, walks(rng, after, 120), steps, seed + i) for i, after in enumerate(own)]
    mixed = [row for _ in range(30) for row in walks(rng, chain(), 4)]
    reference = learned(model, mixed, steps // 2, seed)

    def seen(rows: list[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        sizes = [len(r.ids) for r in rows]
        each = [likelihood(model, t, None, rows, sizes, Limits()) for t in [*thetas[:MODELS], reference]]
        return np.stack(each[:MODELS], 1), each[MODELS]

    def none(count: int) -> list[Encoded]:
        return [row for _ in range(count // 4) for row in walks(rng, chain(), 4)]

    starts = rng.integers(1, SYMBOLS, texts)
    fourth = said(model, thetas[MODELS], texts, seed, starts)
    half = len(fourth) // 2
    margin = how.margin(*seen([*none(nobodys - half), *fourth[:half]]))
    right = [w == i for i in range(MODELS)
             for w in how.attribute(*seen(said(model, thetas[i], texts, seed + i, starts)), margin)]
    wrong = [w is not None for w in how.attribute(*seen([*none(nobodys - half), *fourth[half:]]), margin)]
    return {"accuracy": float(np.mean(right)), "false": float(np.mean(wrong)), "margin": margin}


RIGS = {"origin": origin}
